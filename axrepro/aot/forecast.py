"""What a run will be on hardware that is not there: memory, step time, throughput and price."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from axrepro.aot import program as programs
from axrepro.aot.compile import Compiled, DoesNotFitError, compile_step
from axrepro.aot.efficiency import EFFICIENCY
from axrepro.aot.lint import Finding, check
from axrepro.aot.memory import Memory, read_memory
from axrepro.aot.program import Program
from axrepro.aot.slices import Slice
from axrepro.aot.step_time import StepTime, step_time
from axrepro.train.effect import Effect, effect
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import CHIPS, Chip, slice_name

DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A compiled step and what follows from it.

    Attributes:
      hardware: the slice, or a number of emulated CPU devices, of which no times are told.
      memory: of one device.   time: None for CPUs.
      effect: parameters, FLOPs and bytes that follow from the config alone.
    """

    experiment: Experiment = field(repr=False)
    hardware: Slice | int
    compiled: Compiled
    program: Program = field(repr=False)
    memory: Memory
    time: StepTime | None
    effect: Effect = field(repr=False)

    @property
    def devices(self) -> int:
        """As jax counts them."""
        return self.hardware if isinstance(self.hardware, int) else self.hardware.devices

    @property
    def chip(self) -> Chip | None:
        """Of the slice; None for CPUs."""
        return None if isinstance(self.hardware, int) else CHIPS[self.hardware.kind]

    @property
    def fits(self) -> bool:
        """Whether a device has as much memory as the step needs; of CPUs that is not asked."""
        return self.compiled.capacity is None or self.memory.total <= self.compiled.capacity

    @cached_property
    def findings(self) -> list[Finding]:
        """What makes the step slower than it need be."""
        return check(self.program, self.compiled.mesh, self.chip, self.experiment.rules)

    @cached_property
    def speed(self) -> Mapping[str, float]:
        """What the step time amounts to, see `speeds`; {} without one."""
        if self.time is None or self.chip is None:
            return {}
        return speeds(self.time.seconds, self.experiment, self.effect, self.chip, self.devices)


def speeds(seconds: float, experiment: Experiment, facts: Effect, chip: Chip, devices: int) -> dict[str, float]:
    """What a step of so many seconds amounts to on so many devices.

    "mfu" counts attention as masked, "mfu_full" whole; "{unit}_per_second" and "{unit}_per_day" are of all devices;
    "usd_per_billion_{unit}" is at the list price, where there is one; "checkpoint_share" is how much longer the run
    takes because the state is copied to the hosts every `checkpoint.every` steps.
    """
    unit, chips = facts.unit, devices / chip.devices
    peak = chip.tflops * 1e12 * chips
    rate = facts.units / seconds
    found = {
        "step_seconds": seconds,
        "mfu": facts.flops.causal / seconds / peak,
        "mfu_full": facts.flops.full / seconds / peak,
        f"{unit}_per_second": rate,
        f"{unit}_per_day": rate * DAY,
    }
    if chip.price is not None:
        found[f"usd_per_billion_{unit}"] = chip.price.usd * chips / 3600 / rate * 1e9
    if chip.pcie_gbs is not None:
        sizes = facts.bytes_per_device
        state = sum(size for kind, size in sizes.items() if kind not in ("gradients", "batch"))
        copy = state * chip.devices / (chip.pcie_gbs * 1e9)
        found["checkpoint_share"] = copy / (experiment.checkpoint.every * seconds)
    return found


def forecast(experiment: Experiment, hardware: Slice | int, machine_code: bool = False) -> Forecast:
    """Compiles an experiment, to which mesh rule and overrides have been applied, and tells what it will be.

    Args:
      machine_code: whether `compiled.executable` is made, if the step fits into memory.
    Raises:
      UserError: if experiment, mesh and hardware do not agree, or the compiler is not installed.
    """
    if isinstance(hardware, int):
        facts = effect(experiment, slice_name("cpu", hardware), hardware)
    else:
        facts = effect(experiment, slice_name(hardware.kind, hardware.devices), hardware.devices, hardware.slices)
    try:
        compiled = compile_step(experiment, hardware, machine_code)
    except DoesNotFitError:
        compiled = compile_step(experiment, hardware)
    program = programs.read(compiled.text)
    memory = read_memory(compiled.buffers, compiled.live_ranges, program.module)
    time = None
    if not isinstance(hardware, int):
        time = step_time(program, compiled, hardware, EFFICIENCY[hardware.kind])
    return Forecast(
        experiment=experiment,
        hardware=hardware,
        compiled=compiled,
        program=program,
        memory=memory,
        time=time,
        effect=facts,
    )
