"""python -m axrepro.study: runs a study and writes its report.

    python -m axrepro.study moe_vs_dense --workdir=runs/moe_vs_dense

measures step times on this machine, trains and scores every cell, and writes study.md with tables and figures. Stopped
at any instant, the same command goes on. `--topology=v5p-1024` adds forecasts for a slice that is not here.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from axrepro.command_line import Parser, add_machine_flags, check_machine_flags, told
from axrepro.errors import UserError, nearest

_PARTS = ("rungs", "no_ablations", "no_ladder")  # flags that choose what is trained
_HELP = """
Fields of the study, and of all its experiments at once, are set by their path:
  --study.seeds=0,1 --study.tokens_per_parameter=5 --study.hours=2 --experiment.data.batch_size=32
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m axrepro.study",
        description="Compare mixtures of experts with dense models at equal cost, on this machine or by forecast.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", help="a function under experiments/ that returns a Study")
    parser.add_argument("--list", action="store_true", help="print the studies and what they ask")
    parser.add_argument("--workdir", metavar="DIR", help="where runs and report go; default runs/STUDY")
    parser.add_argument("--topology", metavar="SLICES", help="forecast for v5p-1024 (more by commas); train nothing")
    parser.add_argument("--plan", action="store_true", help="measure step times, and print what would be trained")
    parser.add_argument("--report", action="store_true", help="only write the report, of what is there")
    parser.add_argument("--rungs", metavar="NAMES", help="train only these scales of the ladder, by commas")
    parser.add_argument("--no_ablations", action="store_true", help="train the ladder alone")
    parser.add_argument("--no_ladder", action="store_true", help="train the ablations alone")
    add_machine_flags(parser)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str], dict[str, str]]:
    """The flags, the changes of the study, and those of its experiments.

    Raises:
      UserError: for a flag that does not exist, or flags that do not go together.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    changes: dict[str, dict[str, str]] = {"study": {}, "experiment": {}}
    for item in rest:
        path, equals, value = item.removeprefix("--").partition("=")
        root, _, inner = path.partition(".")
        if not item.startswith("--") or root not in changes or not inner:
            flags = [a.option_strings[-1].removeprefix("--") for a in parser._actions if a.option_strings]
            raise UserError(f"unknown argument {item!r}; {nearest(path, flags)} (--help shows all)")
        if not equals:
            raise UserError(f"{item!r} needs a value: {item}=VALUE")
        changes[root][inner] = value
    check_machine_flags(args)
    if not args.list and not args.study:
        raise UserError("the name of a study is missing; --list prints them")
    if given := [name for name in ("workdir", "topology", "rungs") if getattr(args, name) == ""]:
        raise UserError(f"--{given[0]}= is empty; give it a value, or leave it out")
    alone = [name for name in ("topology", "plan", "report") if getattr(args, name)]
    if len(alone) > 1:
        raise UserError(f"--{alone[0]} and --{alone[1]} are two things to do; give one of them")
    if args.no_ablations and args.no_ladder:
        raise UserError("--no_ablations and --no_ladder leave nothing to train; give one of them")
    if fixed := [path for path in changes["experiment"] if path in ("train.steps", "train.seed")]:
        raise UserError(f"--experiment.{fixed[0]} is what the study decides; --study.hours and --study.seeds change it")
    return args, changes["study"], changes["experiment"]


def _chosen(study, flags: dict):
    """The study without what the flags leave out."""
    if flags["rungs"]:
        names, wanted = [rung.name for rung in study.ladder], flags["rungs"].split(",")
        if wrong := [name for name in wanted if name not in names]:
            raise UserError(f"--rungs={flags['rungs']}: no rung {wrong[0]!r}; {nearest(wrong[0], names)}")
        study = replace(study, ladder=tuple(rung for rung in study.ladder if rung.name in wanted))
    if flags["no_ablations"]:
        study = replace(study, ablations=())
    return replace(study, ladder=()) if flags["no_ladder"] else study


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def _folder(name: str, args: argparse.Namespace):
    """Of the study's files, made if need be. Raises UserError if it holds another study."""
    from axrepro.study.files import read_json
    from axrepro.train.processes import on_first
    from axrepro.train.workdir import Workdir

    workdir = Workdir(args.workdir or f"runs/{name}")
    folder = workdir.checkpoints.parent  # in the bucket, if it is one

    def check() -> None:
        record = read_json(folder / "study.json")
        if record is not None and record.get("study") != name:
            raise UserError(f"{workdir.address} holds the study {record.get('study')!r}; choose another --workdir")
        if record is None and (folder / "config.json").exists():
            raise UserError(f"{workdir.address} holds a run, not a study; choose another --workdir")

    on_first(check)
    return folder


def _record(folder, name: str, study, flags: dict, argv: list[str]) -> None:
    """Writes down how this start was made, beside the earlier ones."""
    from axrepro.core.config import to_json
    from axrepro.study.files import read_json, write_json
    from axrepro.study.measured import device
    from axrepro.train.provenance import git_commit, versions

    path = folder / "study.json"
    record = read_json(path) or {"study": name, "starts": []}
    start = {
        "command": shlex.join(["python", "-m", "axrepro.study", *argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": device(),
        "versions": versions(),
        "git_commit": git_commit(),
        "flags": flags,
        "config": json.loads(to_json(study)),
    }
    record["starts"].append(start)
    write_json(path, record)


def run(argv: list[str]) -> int:
    """The command; returns the exit code. Raises UserError for wrong input."""
    from axrepro import launch, registry

    args, of_study, of_experiments = parse(argv)
    if args.list:
        entries = registry.index(kind="Study")
        width = max((len(entry.name) for entry in entries), default=0)
        print("\n".join(f"{entry.name:{width}}  {entry.description}" for entry in entries))
        return 0
    if args.report:
        os.environ["JAX_PLATFORMS"] = "cpu"  # and leave the accelerator to the study that runs
    launch.set_up_platform(args)
    if not args.topology and not args.report:
        launch.join_processes(args)
    from axrepro.core.config import override

    entry = registry.find(args.study, registry.index(kind="Study"))
    flags = {"study": of_study, "experiment": of_experiments, **{name: getattr(args, name) for name in _PARTS}}
    study = _chosen(override(registry.load(entry), of_study), flags)
    folder = _folder(entry.name, args)
    if args.report or args.topology:
        return _without_training(entry, folder, args, flags)
    return _train(entry.name, study, flags, folder, args.plan, argv)


def _without_training(entry, folder, args: argparse.Namespace, flags: dict) -> int:
    """Forecasts, and the report of what is there: by the flags of the last start, except for those given now."""
    from axrepro import registry
    from axrepro.core.config import override
    from axrepro.study.files import locked, read_json
    from axrepro.study.forecasts import forecast_all

    if args.report and not any((folder / file).exists() for file in ("step_times.json", "forecasts")):
        raise UserError(f"{folder} holds no study; give the --workdir of one, or leave out --report to run it")
    if starts := (read_json(folder / "study.json") or {"starts": []})["starts"]:
        old = starts[-1].get("flags", {})
        flags = {name: {**old.get(name, {}), **flags[name]} for name in ("study", "experiment")} | {
            name: flags[name] or old.get(name) for name in _PARTS
        }
    study = _chosen(override(registry.load(entry), flags["study"]), flags)
    with locked(folder):
        for topology in args.topology.split(",") if args.topology else ():
            forecast_all(study.outlook, flags["experiment"], topology, folder, _say)
        _report(entry.name, study, flags["experiment"], folder)
    return 0


def _train(name: str, study, flags: dict, folder, plan_only: bool, argv: list[str]) -> int:
    import jax

    from axrepro import launch
    from axrepro.study import sweep
    from axrepro.study.files import BusyError, locked
    from axrepro.study.measured import measure_all
    from axrepro.study.plan import Plan
    from axrepro.train.processes import on_first

    hardware, changes = launch.attached_hardware(), flags["experiment"]
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(locked(folder)))
        known = measure_all(study, changes, folder, hardware, _say)
        if not plan_only:
            on_first(lambda: _record(folder, name, study, flags, argv))
    plan = Plan(known.study, known.facts, changes)
    cells = list({cell.key: cell for cell in plan.cells()}.values())
    open_ = [cell for cell in cells if not (folder / cell.folder / "cell.json").exists()]
    _say(_planned(plan, cells, len(open_), plan.seconds(open_)))
    if plan_only:
        return 0
    try:
        failed = sweep.run(cells, folder, hardware, study.questions, _say)
    except sweep.StoppedError:
        _say("stopped; the same command goes on")
        return 0
    notes = [
        f"{cell.arm.name}, {cell.steps} steps, seed {cell.seed}: {failed[cell.key]}"
        for cell in cells
        if cell.key in failed
    ]
    if jax.process_index() == 0:
        try:
            with locked(folder):
                _report(name, study, changes, folder, notes)
        except BusyError:
            print("another process writes the report", flush=True)
    return 1 if failed or known.missing else 0


def _planned(plan, cells, open_: int, seconds: float) -> str:
    lines = [f"{'arm':32} {'ms a step':>10} {'steps':>8} {'tokens':>12} {'minutes':>8} {'seeds':>6}"]
    by_run = {}
    for cell in cells:
        by_run.setdefault(cell.key[:3], []).append(cell)
    for same in by_run.values():
        facts, steps = plan.of(same[0].arm), same[0].steps
        step = facts.seconds.value
        tokens = steps * facts.tokens
        lines.append(
            f"{same[0].arm.name:32} {step * 1e3:10.2f} {steps:8,} {tokens:12,} {steps * step / 60:8.1f} {len(same):6}"
        )
    lines.append(f"{len(cells)} runs, of which {open_} are open: {seconds / 60:,.0f} minutes of training")
    return "\n".join(lines)


def _report(name: str, study, changes: dict[str, str], folder, notes: list[str] | None = None) -> None:
    """Writes it; in a bucket, through a folder of this machine."""
    from axrepro.study.compare import assemble
    from axrepro.study.report import write

    results = assemble(name, study, changes, folder, notes or [])
    if "://" in str(folder):
        with tempfile.TemporaryDirectory() as scratch:
            write(results, Path(scratch))
            for path in (p for p in Path(scratch).rglob("*") if p.is_file()):
                target = folder / path.relative_to(scratch).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    else:
        write(results, Path(folder))
    print(f"the report is {folder}/study.md", flush=True)


def main(argv: list[str] | None = None) -> int:
    """`run` with errors told in words: exit code 2 for wrong input, 1 if a run failed."""
    return told(run, sys.argv[1:] if argv is None else argv, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
