"""What an experiment comes to on some hardware: parameters, partitions, FLOPs, bytes, names of losses and metrics.

Everything is derived from shapes; no array is made, so that the largest experiment takes seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import jax
from jax.sharding import PartitionSpec

from axrepro.core.aux import Loss, Metric, Update, collect
from axrepro.core.flops import Flops
from axrepro.core.param import Param, Role, abstract_params, count_params
from axrepro.core.sharding import MeshShape, param_partitions, shard_bytes
from axrepro.core.tree import flatten
from axrepro.data import logical_axes
from axrepro.train.experiment import Experiment
from axrepro.train.state import Program, state_layout


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter; those of stacked layers are one, with the layers as a leading axis.

    Attributes:
      shape: unsharded.   axes: a logical axis per dimension.   partition: mesh axes that split each.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: Role
    dtype: str
    partition: PartitionSpec

    def __str__(self) -> str:
        return f"{self.shape} {' '.join(map(str, self.axes))}, {self.role} {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What follows from a config on some hardware.

    Attributes:
      slice_name: public name of the hardware.   mesh: devices per mesh axis.
      parameters: by path.   total, active: elements in all, and those that one token uses.
      unit, units: what a batch counts ("tokens" or "examples"), and how many.   flops: of one train step.
      bytes_per_device: what one device holds between steps, by kind; activations come on top, as compiled.
      losses, metrics, updates: paths of what the loss of each phase returns; in `updates` they are parameters.
    """

    slice_name: str
    mesh: dict[str, int]
    parameters: dict[str, Parameter]
    total: int
    active: int
    unit: str
    units: int
    flops: Flops
    bytes_per_device: dict[str, int]
    losses: tuple[str, ...]
    metrics: tuple[str, ...]
    updates: tuple[str, ...]

    @property
    def outside(self) -> int:
        """Parameters outside the embedding and the head: those without an axis for the vocabulary."""
        return sum(math.prod(one.shape) for one in self.parameters.values() if "vocab" not in one.axes)


def effect(experiment: Experiment, slice_name: str, num_devices: int, slices: int = 1) -> Effect:
    """The effect of an experiment to which mesh rules and overrides have been applied.

    Raises:
      UserError: if the mesh does not fit the devices or the parameters, or the data does not fit the method.
    """
    shapes = {name: array.shape for name, array in experiment.data.abstract().items()}
    experiment.method.check(shapes, None)  # the size of the vocabulary may be in a file that is not here
    mesh = experiment.mesh.sizes(num_devices, slices)
    program = Program(experiment, mesh=None, platform="cpu")
    partitions = flatten(param_partitions(program.specs, experiment.rules, mesh))
    # neither layout nor recomputation changes a name: one trace serves all hardware
    plain = replace(experiment.train, remat="none", compiler_options=())
    names = _names(replace(experiment, mesh=MeshShape(), mesh_rules=(), train=plain))
    return Effect(
        slice_name=slice_name,
        mesh=mesh,
        parameters={path: _parameter(spec, partitions[path]) for path, spec in flatten(program.specs).items()},
        total=count_params(program.specs),
        active=count_params(program.specs, active=True),
        unit="tokens" if "tokens" in shapes else "examples",
        units=math.prod(shapes["tokens"]) if "tokens" in shapes else experiment.data.batch_size,
        flops=experiment.method.flops(shapes),
        bytes_per_device=bytes_per_device(program, mesh),
        losses=names[Loss],
        metrics=names[Metric],
        updates=names[Update],
    )


def _parameter(spec: Param, partition: PartitionSpec) -> Parameter:
    return Parameter(shape=spec.shape, axes=spec.axes, role=spec.role, dtype=spec.dtype, partition=partition)


@cache
def _names(experiment: Experiment) -> dict[type, tuple[str, ...]]:
    """Paths of each kind of aux value; with the phase in front where there are several, but for parameters."""
    program, method, batch = (
        Program(experiment, mesh=None, platform="cpu"),
        experiment.method,
        experiment.data.abstract(),
    )
    params = abstract_params(program.specs)
    names: dict[type, dict[str, None]] = {Loss: {}, Metric: {}, Update: {}}
    for phase in program.phases:

        def aux(params, batch, key, phase=phase):
            batch = method.rollout(params, batch, program.context(key, train=False))
            return method.loss(params, batch, program.context(key, train=True, phase=phase.name))

        found = jax.eval_shape(aux, params, batch, jax.eval_shape(jax.random.key, 0))
        for tag in names:
            prefix = f"{phase.name}/" if len(program.phases) > 1 and tag is not Update else ""
            names[tag] |= {f"{prefix}{path}": None for path in collect(found, tag)}
    return {tag: tuple(paths) for tag, paths in names.items()}


def bytes_per_device(program: Program, mesh: Mapping[str, int]) -> dict[str, int]:
    """Bytes that one device holds between steps, by kind.

    Args:
      mesh: devices per mesh axis.
    """
    state, layout = jax.eval_shape(program.init, 0), state_layout(program, mesh)

    def total(tree, specs) -> int:
        leaves = jax.tree.leaves(tree)
        specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        return sum(shard_bytes(x.shape, x.dtype.itemsize, spec, mesh) for x, spec in zip(leaves, specs, strict=True))

    trained = program.trained_paths
    params, specs = flatten(state.params), flatten(layout.params)
    batch = program.experiment.data.abstract()
    rules = program.experiment.rules
    averaged = {"averaged parameters": total(state.average, layout.average)} if state.average else {}
    return {
        "parameters": total(state.params, layout.params),
        "optimizer state": total(state.opt_state, layout.opt_state),
        **averaged,
        "gradients": total({path: params[path] for path in trained}, {path: specs[path] for path in trained}),
        "batch": total(batch, {name: rules.spec(logical_axes(x), x.shape, mesh) for name, x in batch.items()}),
    }
