"""The settings of a run that a slice finishes soonest: meshes, rematerialisation and microbatches, each compiled."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from axrepro.aot.forecast import Forecast, forecast
from axrepro.aot.slices import Slice
from axrepro.core.config import override, walk
from axrepro.core.remat import POLICIES
from axrepro.errors import UserError
from axrepro.train.experiment import Experiment

MICROBATCHES = (1, 2, 4, 8)
MODEL = (1, 2, 4)
_AGAIN = 3  # meshes that are tried with the rematerialisation and microbatches that were best for another
Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting.

    Attributes:
      changes: what it overrides, as (path, value).
      forecast: None where there is none, and `reason` is why: mesh and experiment do not agree.
    """

    changes: Changes
    forecast: Forecast | None = None
    reason: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it is not known, or the step does not fit into memory."""
        if self.forecast is None or self.forecast.time is None or not self.forecast.fits:
            return math.inf
        return self.forecast.time.seconds

    @property
    def line(self) -> str:
        """The overrides, as a command takes them."""
        return " ".join(f"--experiment.{path}={value}" for path, value in self.changes)


def search(
    experiment: Experiment, hardware: Slice, report: Callable[[Trial], None] = lambda trial: None
) -> list[Trial]:
    """Every setting that was tried, the fastest first.

    All settings together are too many to compile. One kind is varied at a time, around the best so far: the mesh, then
    what is kept for the backward pass, then the number of microbatches; and then the best meshes once more.

    Args:
      experiment: with mesh rule and overrides applied.   report: is told each trial as it ends.
    """
    tried: dict[Changes, Trial] = {}

    def attempt(changes: Changes) -> Trial:
        if changes not in tried:
            tried[changes] = _attempt(experiment, hardware, changes)
            report(tried[changes])
        return tried[changes]

    speed = lambda trial: trial.seconds
    best = attempt(_own(experiment, hardware))
    first = {option: attempt(_merged(best.changes, option)) for option in meshes(experiment, hardware)}
    best = min(best, *first.values(), key=speed)
    for kind in (remats, microbatches):
        best = min([best, *(attempt(_merged(best.changes, o)) for o in kind(experiment, hardware))], key=speed)
    for option in sorted(first, key=lambda option: first[option].seconds)[:_AGAIN]:
        attempt(_merged(best.changes, option))
    return sorted(tried.values(), key=speed)


def remedies(experiment: Experiment, hardware: Slice | int) -> list[Trial]:
    """What lets a step that does not fit use less memory, each alone and the first two together."""
    recompute: Changes = (("train.remat", "full"),)
    split: Changes = (("train.grad_accumulation", str(2 * experiment.train.grad_accumulation)),)
    host: Changes = (("train.remat", "offload_input_qkvo"),)
    return [_attempt(experiment, hardware, changes) for changes in (recompute, split, recompute + split, host)]


def meshes(experiment: Experiment, hardware: Slice) -> Iterator[Changes]:
    """Splits of the devices over `fsdp`, `expert` and `model`, copies of the model only between slices."""
    within = hardware.devices // hardware.slices
    experts = [part.num_experts for _, part in walk(experiment.method) if hasattr(part, "num_experts")]
    rows = experiment.data.batch_size
    for model in MODEL:
        for expert in _powers(math.gcd(*experts) if experts else 1):
            if within % (model * expert) or rows % (hardware.devices // model):
                continue
            sizes = {"data": hardware.slices, "fsdp": within // model // expert, "expert": expert, "model": model}
            yield tuple((f"mesh.{axis}", str(size)) for axis, size in sizes.items())


def remats(experiment: Experiment, hardware: Slice) -> Iterator[Changes]:
    """The named policies."""
    del experiment, hardware
    return ((("train.remat", name),) for name in POLICIES)


def microbatches(experiment: Experiment, hardware: Slice) -> Iterator[Changes]:
    """Numbers of microbatches of which each device gets rows."""
    for number in MICROBATCHES:
        if experiment.data.batch_size % (number * hardware.devices) == 0:
            yield (("train.grad_accumulation", str(number)),)


def _own(experiment: Experiment, hardware: Slice) -> Changes:
    """The settings that it has, as changes."""
    sizes = experiment.mesh.sizes(hardware.devices, hardware.slices)
    mesh = tuple((f"mesh.{axis}", str(sizes[axis])) for axis in ("data", "fsdp", "expert", "model"))
    train = experiment.train
    return (*mesh, ("train.remat", train.remat), ("train.grad_accumulation", str(train.grad_accumulation)))


def _merged(changes: Changes, more: Changes) -> Changes:
    return tuple({**dict(changes), **dict(more)}.items())


def _attempt(experiment: Experiment, hardware: Slice | int, changes: Changes) -> Trial:
    try:
        return Trial(changes=changes, forecast=forecast(override(experiment, dict(changes)), hardware))
    except UserError as error:
        return Trial(changes=changes, reason=str(error))


def _powers(number: int) -> list[int]:
    return [2**power for power in range(number.bit_length()) if number % 2**power == 0]
