"""python -m axrepro.data: shows what an experiment's data gives, and prepares files.

`train-vocab`, `convert` and `preprocess` are commands with flags of their own (`--help` after each).
"""

import importlib
import os
import sys
from pathlib import Path

from axrepro.command_line import Parser, find_function, told
from axrepro.errors import UserError, nearest

COMMANDS = ("train-vocab", "convert", "preprocess")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m axrepro.data",
        description="Show what an experiment's data gives: decoded examples, pictures, and how fast they come.",
        epilog="Fields are set by their path: --experiment.data.batch_size=4. Other commands, each with --help: "
        + ", ".join(COMMANDS),
    )
    parser.add_argument("--experiment", metavar="NAME", help="a function under experiments/, or file:function")
    parser.add_argument("--data", metavar="MODULE:FUNCTION", help="in its place: a function that returns data")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="examples to print; default: 3")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="default: train")
    parser.add_argument("--pictures", metavar="DIR", default="pictures", help="for PNG files; default: pictures")
    parser.add_argument("--seconds", type=float, default=3.0, help="to measure the speed; default: 3")
    return parser


def _run(argv: list[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    overrides = {}
    for item in rest:
        name, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or "." not in name:
            known = [action.option_strings[-1].removeprefix("--") for action in _parser()._actions]
            raise UserError(f"unknown argument {item!r}; {nearest(item.removeprefix('--'), [*known, *COMMANDS])}")
        if not equals:
            raise UserError(f"{item!r} needs a value: {item}=VALUE")
        overrides[name.removeprefix("experiment.").removeprefix("data.")] = value
    if (args.experiment is None) == (args.data is None):
        raise UserError("give one of --experiment=NAME and --data=MODULE:FUNCTION (or a command: --help shows all)")
    if args.show < 0:
        raise UserError(f"--show={args.show} must be at least 0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from axrepro.core.config import override
    from axrepro.core.sharding import MeshShape, make_mesh
    from axrepro.data.tools.show import show, throughput

    seed, data = _experiment(args.experiment) if args.data is None else (0, _function(args.data))
    data = override(data, overrides)
    batches = data.batches(args.split, seed, make_mesh(MeshShape(), jax.devices()[:1]))
    try:
        start = batches.position()
        for line in show(data, batches, args.show, Path(args.pictures)):
            print(line)
        batches.seek(start)
        print()
        for line in throughput(batches, args.seconds):
            print(line)
    finally:
        batches.close()
    return 0


def _experiment(name: str):
    from axrepro import registry

    experiment = registry.load(registry.find(name, registry.index()))
    return experiment.train.seed, experiment.data


def _function(name: str):
    from axrepro.data.base import Data

    make = find_function("data", name)
    try:
        data = make()
    except Exception as error:
        raise UserError(f"--data={name}: {type(error).__name__}: {error}") from error
    if not isinstance(data, Data):
        raise UserError(f"--data={name} returns a {type(data).__name__}, not data such as Text or Pipeline")
    return data


def _command(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"axrepro.data.tools.{argv[0].replace('-', '_')}").run(argv[1:])
    return _run(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 2 for wrong input."""
    resumes = "interrupted; convert and preprocess go on where they stopped"
    return told(_command, sys.argv[1:] if argv is None else argv, resumes)


if __name__ == "__main__":
    sys.exit(main())
