"""python -m axrepro.launch: runs an experiment.

Nothing heavy is imported before the platform is chosen, and a wrong input ends in one line and exit code 2.
"""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from axrepro.command_line import Parser, add_machine_flags, check_machine_flags, told
from axrepro.errors import UserError, nearest

FLAGS = ("own", "default")
MODES = ("train", "describe", "compile", "eval")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_HELP = """
Any field of the experiment is set by its path, for example
  --experiment.train.steps=100 --experiment.mesh.fsdp=8 --experiment.method.model.dim=256
("experiment." may be left out). --mode=describe prints all fields.
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m axrepro.launch",
        description="Train, evaluate or describe an experiment, or compile it for hardware that is not there.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--experiment", metavar="NAME", help="a function under experiments/, or file:function")
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives; default runs/NAME")
    parser.add_argument("--mode", choices=MODES, default="train", help="default: train; it resumes where it stopped")
    parser.add_argument("--list", action="store_true", help="print the experiments and what they are")
    parser.add_argument(
        "--topology", metavar="SLICE", help="describe or compile for this slice: v5p-1024, v5p:8x8x8, 2xv6e-256"
    )
    parser.add_argument("--explain", metavar="PATH", help="describe where the value of a field, or a group, comes from")
    parser.add_argument("--diff", metavar="OTHER", help="describe how OTHER differs: fields, parameters, FLOPs, bytes")
    parser.add_argument("--json", action="store_true", help="compile: print the report for machines")
    parser.add_argument(
        "--html", metavar="FILE", help="compile: write the report as a page, with a picture of the step"
    )
    parser.add_argument("--search", action="store_true", help="compile: try meshes, remat policies and microbatches")
    parser.add_argument("--save", metavar="FILE", help="compile: write the program, for --program")
    parser.add_argument("--program", metavar="FILE", help="train: read the step from FILE if it is this one's")
    parser.add_argument("--flags", choices=FLAGS, default="own", help="compile: with the run's compiler flags, or none")
    add_machine_flags(parser)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides by path.

    Raises:
      UserError: for a flag that does not exist, or a value that it cannot take.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = {}
    for item in rest:
        name, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or "." not in name:
            flags = [action.option_strings[-1].removeprefix("--") for action in parser._actions]
            raise UserError(f"unknown argument {item!r}; {nearest(name, flags)} (--help shows all)")
        if not equals:
            raise UserError(f"{item!r} needs a value: {item}=VALUE")
        overrides[name.removeprefix("experiment.")] = value
    check_machine_flags(args)
    given = ("workdir", "topology", "html", "save", "program", "coordinator")
    if empty := [name for name in given if getattr(args, name) == ""]:
        raise UserError(f"--{empty[0]}= is empty; give it a value, or leave it out")
    if not args.list and not args.experiment:
        raise UserError("--experiment=NAME is missing; --list prints the names")
    if args.topology and args.mode not in ("describe", "compile"):
        raise UserError(f"--topology goes with --mode=describe and --mode=compile, not --mode={args.mode}")
    if args.mode == "compile" and not args.topology:
        raise UserError("--mode=compile needs --topology=SLICE, such as v5p-1024, or cpu-8 for emulated devices")
    for name in ("devices", "workdir", "coordinator", "num_processes", "process_id"):
        if args.mode == "compile" and getattr(args, name) is not None:
            raise UserError(f"--{name} does nothing with --mode=compile, which compiles for --topology={args.topology}")
    for name, absent in (("json", False), ("html", None), ("search", False), ("save", None), ("flags", "own")):
        if getattr(args, name) != absent and args.mode != "compile":
            raise UserError(f"--{name} goes with --mode=compile, not --mode={args.mode}")
    if args.program is not None and args.mode != "train":
        raise UserError(f"--program goes with --mode=train, not --mode={args.mode}; --save=FILE writes it")
    for name in ("html", "save"):
        if getattr(args, name) and args.search:
            raise UserError(f"--{name} is about one forecast and --search makes many; give one of them")
    for name in ("explain", "diff"):
        if getattr(args, name) is not None and args.mode != "describe":
            raise UserError(f"--{name} goes with --mode=describe, not --mode={args.mode}")
    if args.explain is not None and args.diff is not None:
        raise UserError("--explain is about one experiment and --diff about two; give one of them")
    return args, overrides


def _has_accelerator() -> bool:
    """Whether this machine has a GPU or TPU, not merely its software."""
    dev = Path("/dev")
    return any(dev.glob("nvidia[0-9]*")) or any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))


def set_up_platform(args: argparse.Namespace) -> None:
    """Chooses the platform before jax looks for one, so that absent hardware makes no noise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    on_cpu = args.devices is not None or args.topology
    if on_cpu or ("JAX_PLATFORMS" not in os.environ and not _has_accelerator()):
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if args.devices is not None:
        jax.config.update("jax_num_cpu_devices", args.devices)


def join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of the job: by the flags, or as SLURM or a TPU pod describes them.

    Raises:
      UserError: if the flags are incomplete, or the coordinator is not reached.
    """
    import jax

    flags = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    given = [name for name, value in flags.items() if value is not None]
    # the variables of a step: those of an allocation are also there where one process runs by itself
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    slurm = tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in os.environ
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    detected = slurm or pod or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    if given and len(given) < len(flags):
        missing = [name for name in flags if name not in given]
        raise UserError(f"--{given[0]} needs --{' and --'.join(missing)} too")
    if args.num_processes is not None and args.process_id >= args.num_processes:
        raise UserError(f"--process_id={args.process_id} must be less than --num_processes={args.num_processes}")
    try:
        if given:
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        elif detected:
            jax.distributed.initialize()
        elif os.environ.get("JAX_PLATFORMS", "") != "cpu" and any(Path("/dev").glob("accel[0-9]*")):
            # a TPU machine that may be one of a pod: only its metadata server knows
            with contextlib.suppress(RuntimeError, ValueError):
                jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {' '.join(str(error).split())[:300]}") from None


def attached_hardware() -> tuple[str, int, int]:
    """(slice name, devices, slices) of this machine."""
    from axrepro.train.hardware import slice_name

    devices = _devices()
    return slice_name(devices[0].device_kind, len(devices)), len(devices), 1


def _hardware(args: argparse.Namespace) -> tuple[str, int, int]:
    """The hardware that was asked for, else that of this machine."""
    from axrepro.train.hardware import CHIPS, parse_topology, slice_name

    if not args.topology:
        return attached_hardware()
    kind, count, slices = parse_topology(args.topology)
    if args.mode == "compile" and kind in CHIPS and CHIPS[kind].torus:
        from axrepro.aot.slices import find_slice

        find_slice(args.topology)  # that there is such a slice comes before what its mesh would be
    return slice_name(kind, count), count, slices  # the name that the mesh rules see, also before the hardware is there


def configured(entry, hardware: tuple[str, int, int], overrides: Mapping[str, str]):
    """The experiment on this hardware, overridden, and its mesh rule: what a launch would run.

    Args:
      entry: of the registry.
    Raises:
      UserError: for a wrong override, and for settings that would have no effect.
    """
    from axrepro import registry
    from axrepro.core.config import override
    from axrepro.train.experiment import on_hardware
    from axrepro.train.lint import require_clean

    where, count, slices = hardware
    original = registry.load(entry)
    experiment, rule = on_hardware(original, where)
    experiment = override(experiment, overrides)
    require_clean(original, experiment, where, experiment.mesh.sizes(count, slices), tuple(overrides))
    return experiment, rule


def _devices() -> list:
    """All devices. Raises UserError if the platform that was asked for is not there."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no devices (JAX_PLATFORMS={asked!r}): {' '.join(str(error).split())[:200]}") from None
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"{jax.process_count()} processes see each other's devices but have not joined; "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    return devices


def _train(name: str, experiment, args: argparse.Namespace, workdir: str) -> int:
    import jax

    from axrepro.train.loop import train
    from axrepro.train.saved import read
    from axrepro.train.workdir import Workdir

    saved = None if args.program is None else read(args.program)
    if jax.process_index() == 0:
        print(f"{name} on {jax.device_count()} × {jax.devices()[0].device_kind}, workdir {workdir}", flush=True)
    try:
        outcome = train(experiment, Workdir(workdir), name, saved)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        again = "make room, and the same command goes on from the last checkpoint"
        raise UserError(f"cannot write to the workdir {workdir}: {error}; {again}") from error
    if jax.process_index() == 0 and outcome.complete:
        print(f"complete at step {outcome.step}; {workdir}/curve.png shows the run", flush=True)
    return 0


def _evaluate(name: str, experiment, args: argparse.Namespace, workdir: str) -> int:
    import json

    import jax

    from axrepro.train.loop import evaluate
    from axrepro.train.workdir import Workdir

    step, scalars = evaluate(experiment, Workdir(workdir))
    if jax.process_index() == 0:
        print(json.dumps({"step": step, **scalars}), flush=True)
    return 0


def _write(flag: str, file: str, content: bytes | None) -> None:
    """Writes the file of a flag whole or not at all; without content, only sees whether it could.

    Raises:
      UserError: if it cannot be written.
    """
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--{flag}={file} is not a file; name one to write to")
        scratch = path.with_name(f"{path.name}.new")
        try:
            scratch.write_bytes(content or b"")
            if content is not None:
                os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write --{flag}={file}: {error.strerror}; name a file in a folder that exists and can be written"
        ) from None


def _compile(name: str, experiment, args: argparse.Namespace) -> int:
    import json
    from dataclasses import replace

    from axrepro.aot import report
    from axrepro.aot.analytic import is_gpu
    from axrepro.aot.forecast import forecast
    from axrepro.aot.slices import find_slice
    from axrepro.train.hardware import parse_topology

    kind, devices, _ = parse_topology(args.topology)
    if is_gpu(kind):
        return _estimate(name, experiment, args)
    hardware = devices if kind == "cpu" else find_slice(args.topology)
    if args.html and kind == "cpu":
        raise UserError(
            f"--html draws times, which are not told for {args.topology}; name a TPU slice, or leave it out"
        )
    if args.flags == "default":
        experiment = replace(experiment, train=replace(experiment.train, compiler_options=()))
    if args.search:
        if isinstance(hardware, int):
            raise UserError(f"--search ranks by step time, which is not known of {args.topology}; take a TPU slice")
        from axrepro.aot.search import search

        tell = lambda trial: print(report.trial(trial), file=sys.stderr, flush=True)
        trials = search(experiment, hardware, tell)
        print(json.dumps([report.trial_summary(t) for t in trials]) if args.json else report.ranking(name, trials))
        return 0
    for flag in ("html", "save"):
        if file := getattr(args, flag):
            _write(flag, file, None)  # a wrong name shall not cost a compilation
    found = forecast(experiment, hardware, args.save is not None)
    if found.compiled.executable is not None:
        _write("save", args.save, found.compiled.executable)
    if args.html:
        from axrepro.aot.page import html

        _write("html", args.html, html(name, found).encode())
    figures = {"experiment": name, **report.summary(found)}
    lines = [report.text(name, found)]
    if not found.fits:
        from axrepro.aot.search import remedies

        trials = remedies(experiment, hardware)
        figures["remedies"] = [report.trial_summary(trial) for trial in trials]
        lines += ["", "it does not fit; what would help:", *map(report.trial, trials)]
    print(json.dumps(figures) if args.json else "\n".join(lines))
    return 0 if found.fits else 3


def _estimate(name: str, experiment, args: argparse.Namespace) -> int:
    import json

    from axrepro.aot import report
    from axrepro.aot.analytic import estimate

    for flag, absent in (("html", None), ("search", False), ("save", None), ("flags", "own")):
        if getattr(args, flag) != absent:
            raise UserError(f"--{flag} needs a compiled step, and {args.topology} is only estimated; name a TPU slice")
    found = estimate(experiment, args.topology)
    figures = {"experiment": name, **report.estimate_summary(found)}
    print(json.dumps(figures) if args.json else report.estimate_text(name, found))
    return 0 if found.fits else 3


def _explain(entry, hardware: tuple[str, int, int], overrides: dict[str, str], path: str) -> str:
    from axrepro import registry
    from axrepro.train.explain import construct, explain

    history = construct(lambda: registry.load(entry), registry.folder(), entry.name)
    path = "" if path == "experiment" else path.removeprefix("experiment.")
    return explain(path, history, hardware[0], overrides)


def _diff(old, new, hardware: tuple[str, int, int], overrides: dict[str, str]) -> str:
    from axrepro.train.describe import compare
    from axrepro.train.effect import effect

    sides = []
    for entry in (old, new):
        try:
            experiment, _ = configured(entry, hardware, overrides)
            sides.append((entry.name, experiment, effect(experiment, *hardware)))
        except UserError as error:
            raise UserError(f"{entry.name}, of the two to which overrides and topology apply: {error}") from None
    return compare(*sides)


def run(argv: list[str]) -> int:
    """The command; returns the exit code. Raises UserError for wrong input."""
    from axrepro import registry

    args, overrides = parse(argv)
    if args.list:
        entries = registry.index()
        width = max((len(entry.name) for entry in entries), default=0)
        print("\n".join(f"{entry.name:{width}}  {entry.description}" for entry in entries))
        return 0
    set_up_platform(args)
    if not args.topology:
        join_processes(args)
    entry, hardware = registry.find(args.experiment, registry.index()), _hardware(args)
    if args.explain is not None:
        print(_explain(entry, hardware, overrides, args.explain))
        return 0
    if args.diff is not None:
        print(_diff(entry, registry.find(args.diff, registry.index()), hardware, overrides))
        return 0
    name, (experiment, rule) = entry.name, configured(entry, hardware, overrides)
    workdir = args.workdir or f"runs/{name.replace(':', '_').replace('/', '_')}"
    if args.mode == "describe":
        from axrepro.train.describe import describe

        print(describe(name, experiment, *hardware, rule))
        return 0
    if args.mode == "compile":
        return _compile(name, experiment, args)
    return {"train": _train, "eval": _evaluate}[args.mode](name, experiment, args, workdir)


def main(argv: list[str] | None = None) -> int:
    """`run` with errors told in words: exit code 2 for wrong input, 1 for a loss not finite, 3 for lack of memory."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return told(run, argv, "interrupted; the same command goes on from the last checkpoint")
    except RuntimeError as error:
        from axrepro.train.not_finite import NotFiniteError
        from axrepro.train.out_of_memory import OutOfMemoryError

        if isinstance(error, OutOfMemoryError):
            print(f"axrepro: {error}", file=sys.stderr)
            return 3
        if not isinstance(error, NotFiniteError):
            raise
        print(f"axrepro: stopped: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
