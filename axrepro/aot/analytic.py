"""What a run will be on GPUs, for which there is no compiler here: an estimate from the config alone, and coarse.

The step takes as long as its matrix products at a share of the published rate, or as its traffic at the published
bandwidths, whichever is longer. Products that rematerialisation does again, and the activations that it keeps, are read
off the traced loss; nothing is compiled.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.extend import core as jex

from axrepro.aot.forecast import speeds
from axrepro.core.aux import objective
from axrepro.core.param import abstract_params
from axrepro.errors import UserError
from axrepro.train.effect import Effect, Parameter, effect
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import CHIPS, Chip, parse_topology, slice_name
from axrepro.train.state import Program

EFFICIENCY = 0.413
"""Share of the rate that the products of a step reach, everything between them included.

The middle of two published dense runs on 8 H100, which reach 0.35 (Llama 3 8B, 8,192 tokens a row, torchtitan with
torch.compile: 6,667 tokens/s a GPU) and 0.49 (Llama 2 7B, 4,096 tokens, MaxText: 11,362), attention as masked and
nothing done again, as neither says what is. Each is thus a fifth off. So far off, and further, are others: torchtitan
without its compiler is 1.4 times slower than is said here, and experts in JAX (Marin, 25 % of the rate) 1.6 times.
"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What follows from a config on GPUs.

    Attributes:
      kind: of the GPUs, a name in CHIPS.   effect: parameters, FLOPs and bytes.
      recomputed: products done again, as a share of those of the model.
      activations: bytes of a device that the loss keeps for the backward pass, as traced: a compiler may keep less, and
        what a layer needs while it runs comes on top. Of several phases, those of the first.
      parts: seconds of a step by what they go to.   left_out: traffic that is not reckoned with.
    """

    experiment: Experiment = field(repr=False)
    kind: str
    devices: int
    effect: Effect = field(repr=False)
    recomputed: float
    activations: int
    parts: Mapping[str, float]
    left_out: tuple[str, ...]

    @property
    def chip(self) -> Chip:
        """One of the GPUs."""
        return CHIPS[self.kind]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def speed(self) -> Mapping[str, float]:
        """What the step time amounts to."""
        return speeds(self.seconds, self.experiment, self.effect, self.chip, self.devices)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a device by kind: what it holds between steps, and the activations."""
        return {**self.effect.bytes_per_device, "activations": self.activations}

    @property
    def capacity(self) -> int:
        """Bytes of a device's memory."""
        return round(self.chip.hbm_gib * 2**30)

    @property
    def fits(self) -> bool:
        """Whether a device has that much; what is left must be enough for what is not counted."""
        return sum(self.memory.values()) <= self.capacity


def is_gpu(kind: str) -> bool:
    """Whether steps of this kind of chip are estimated."""
    return kind in CHIPS and not CHIPS[kind].torus


def estimate(experiment: Experiment, topology: str) -> Estimate:
    """The estimate for an experiment to which mesh rule and overrides have been applied.

    Args:
      topology: public name of the GPUs, such as "h100-64".
    Raises:
      UserError: if they are no GPUs or fill no whole hosts, or experiment and mesh do not fit them.
    """
    kind, devices, slices = parse_topology(topology)
    if not is_gpu(kind):
        gpus = ", ".join(filter(is_gpu, CHIPS))
        raise UserError(f"topology {topology!r}: estimates are for {gpus}; the step of others is compiled")
    chip = CHIPS[kind]
    if devices > chip.domain and (devices % chip.domain or chip.dcn_gbs is None):
        joined = f"{chip.domain} {kind} are joined by NVLink"
        rest = "more must be a multiple of that" if chip.dcn_gbs else "the network between more of them is not known"
        raise UserError(f"topology {topology!r}: {joined}; {rest}")
    facts = effect(experiment, slice_name(kind, devices), devices, slices)
    program = Program(experiment, mesh=None, platform="cpu")
    again = _recomputed(program)
    compute = facts.flops.causal * (1 + again) / (chip.tflops * 1e12 * devices * EFFICIENCY)
    traffic = experiment.train.grad_accumulation * sum(
        _seconds(parameter, experiment, facts.mesh, chip) for parameter in facts.parameters.values()
    )
    batch = _batch_axes(experiment)
    left_out = [f"traffic along {axis}" for axis, size in facts.mesh.items() if size > 1 and axis not in batch]
    if any("expert" in parameter.axes for parameter in facts.parameters.values()) and facts.mesh["expert"] > 1:
        left_out.append("the exchange of tokens with experts")
    return Estimate(
        experiment=experiment,
        kind=kind,
        devices=devices,
        effect=facts,
        recomputed=again,
        activations=_activations(program, facts.mesh, batch),
        parts={"matrix products and what is between them": compute, "waiting: network": max(0.0, traffic - compute)},
        left_out=tuple(left_out),
    )


def _batch_axes(experiment: Experiment) -> tuple[str, ...]:
    """Mesh axes that split the batch."""
    return tuple(axis for axis in dict(experiment.rules.table)["batch"] if axis is not None)


def _seconds(parameter: Parameter, experiment: Experiment, mesh: Mapping[str, int], chip: Chip) -> float:
    """Traffic of one parameter in a microbatch, in the compute type.

    What is split over axes of the batch is gathered for the forward and the backward pass, and its gradient reduced and
    split again; over further axes of the batch, the gradient's parts are summed. Experts stay where they are.
    """
    batch = _batch_axes(experiment)
    split = {
        axis: logical
        for logical, names in zip(parameter.axes, parameter.partition, strict=False)
        for axis in ((names,) if isinstance(names, str) else names or ())
    }
    gathered = [axis for axis in batch if axis in split and split[axis] != "expert"]
    copied = [axis for axis in batch if axis not in split]
    size = math.prod(parameter.shape) * jax.numpy.dtype(experiment.train.dtype).itemsize
    size /= math.prod(mesh[axis] for axis in split if axis not in gathered)
    part = size / math.prod(mesh[axis] for axis in gathered)
    passes = 3 if parameter.role == "trained" else 2
    reduced = 2 * ring_seconds(part, copied, mesh, chip) if parameter.role == "trained" else 0.0
    return passes * ring_seconds(size, gathered, mesh, chip) + reduced


def ring_seconds(size: float, axes: Iterable[str], mesh: Mapping[str, int], chip: Chip) -> float:
    """How long devices along these axes take to gather (or to reduce and split) `size` bytes in all, none hidden.

    Within a domain every device takes in what it lacks over NVLink; from other domains each of its devices takes in an
    equal share over its own adapter, at the same time.
    """
    index = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    group = index[tuple(slice(None) if axis in axes else 0 for axis in mesh)].ravel()
    within = int(np.sum(group // chip.domain == 0))
    domains = len(group) / within
    near = size * (len(group) - 1) / len(group) / (chip.ici_gbs / 2 * 1e9) if within > 1 else 0.0
    far = size * (domains - 1) / domains / within / ((chip.dcn_gbs or math.inf) * 1e9)
    return max(near, far)


def _recomputed(program: Program) -> float:
    """Products of the step beyond those of one without rematerialisation, as a share of these."""
    experiment = program.experiment
    if experiment.train.remat == "none":
        return 0.0
    plain = replace(experiment, train=replace(experiment.train, remat="none"))
    return _products(program) / _products(replace(program, experiment=plain)) - 1


def _loss(program: Program, rows: int):
    """(the loss of the first phase as a function of its parameters, batch and key, and their shapes)."""
    method, phase = program.experiment.method, program.phases[0].name
    batch = program.experiment.data.abstract()
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}

    def loss(params, batch, key):
        batch = method.rollout(params, batch, program.context(key, train=False))
        return objective(method.loss(params, batch, program.context(key, train=True, phase=phase)))

    return loss, (abstract_params(program.specs), batch, jax.eval_shape(jax.random.key, 0))


def _products(program: Program) -> float:
    loss, shapes = _loss(program, rows=1)
    return _product_flops(jax.make_jaxpr(jax.grad(loss))(*shapes).jaxpr)


def _product_flops(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (over, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(left[axis] for axis in over) * equation.outvars[0].aval.size
        inner = sum(map(_product_flops, jex.jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def _activations(program: Program, mesh: Mapping[str, int], batch: Iterable[str]) -> int:
    """Bytes that the loss keeps for the rows of a device: what a further row adds, since weights are kept too."""
    experiment = program.experiment

    def kept(rows: int) -> int:
        loss, (params, *rest) = _loss(program, rows)
        back = jax.eval_shape(lambda params, *rest: jax.vjp(lambda p: loss(p, *rest), params)[1], params, *rest)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))

    shards = math.prod(mesh[axis] for axis in (*batch, "seq"))
    rows = experiment.data.batch_size / experiment.train.grad_accumulation / shards
    return math.ceil(rows * (kept(2) - kept(1)))
