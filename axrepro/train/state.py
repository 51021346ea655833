"""What a run carries from step to step, and the static program around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from axrepro.core.context import Context
from axrepro.core.interfaces import Phase
from axrepro.core.param import abstract_params, init_params
from axrepro.core.sharding import named, param_partitions
from axrepro.core.tree import flatten, matches, select
from axrepro.errors import UserError
from axrepro.optim import state_partitions
from axrepro.train.experiment import Experiment

Leaf = TypeVar("Leaf")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState(Generic[Leaf]):
    """Everything that a checkpoint holds, but the data position.

    Its leaves are arrays, or what stands for them: ShapeDtypeStructs, PartitionSpecs, NamedShardings.

    Attributes:
      step: int32, steps taken.   params: all parameters, whatever their role.
      opt_state: optimizer state by phase.   key: the run's random key; step k uses fold_in(key, k).
    """

    step: Leaf
    params: dict
    opt_state: dict
    key: Leaf


@dataclass(frozen=True, eq=False)
class Program:
    """An experiment on a mesh: what `train_step` needs and arrays do not hold.

    Attributes:
      mesh: None while nothing runs (describe).   platform: what is compiled for.
    """

    experiment: Experiment
    mesh: Mesh | None
    platform: str

    @property
    def run_mesh(self) -> Mesh:
        """The mesh. Raises ValueError where nothing is to run."""
        if self.mesh is None:
            raise ValueError("this program has no mesh: it can be described, but not run")
        return self.mesh

    @cached_property
    def specs(self) -> dict:
        """All parameters of the method."""
        return self.experiment.method.specs()

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, checked."""
        phases = self.experiment.method.phases()
        for phase in phases:
            if not self.trained(phase):
                raise UserError(f"phase {phase.name!r} trains {phase.trains!r}, which matches no trained parameter")
        return phases

    def trained(self, phase: Phase) -> dict:
        """The specs that a phase trains."""
        flat = flatten(self.specs)
        return select(self.specs, lambda path: flat[path].role == "trained" and matches(path, phase.trains))

    @cached_property
    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """The optimizer of each phase. Raises UserError if a pattern in it matches no parameter."""
        config, steps = self.experiment.optimizer, self.experiment.train.steps
        flat = flatten(self.specs)
        config.check(select(self.specs, lambda path: flat[path].role == "trained"))
        return {phase.name: config.build(self.trained(phase), steps) for phase in self.phases}

    def context(self, key: jax.Array | None, train: bool, phase: str = "train") -> Context:
        """The context of a step."""
        settings = self.experiment.train
        return Context(
            key=key,
            train=train,
            phase=phase,
            dtype=settings.dtype,
            remat=settings.remat if train else "none",
            products=settings.products,
            context_parallel=settings.context_parallel,
            platform=self.platform,
            rules=self.experiment.rules,
            mesh=self.mesh,
        )

    def init(self, seed: int | jax.Array, given: Mapping = MappingProxyType({})) -> TrainState[jax.Array]:
        """The first state; pure, to be run under jit with `shardings` as output.

        Args:
          given: values that some parameters start with instead of random ones.
        """
        key = jax.random.key(seed)
        params = init_params(self.specs, jax.random.fold_in(key, 0), given)
        opt_state = {
            phase.name: self.optimizers[phase.name].init(select(params, set(flatten(self.trained(phase))).__contains__))
            for phase in self.phases
        }
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.fold_in(key, 1))

    @cached_property
    def abstract_state(self) -> TrainState[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the state, with their shardings; no array is made."""
        shapes = jax.eval_shape(self.init, 0)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )

    @cached_property
    def partitions(self) -> TrainState[PartitionSpec]:
        """A PartitionSpec per leaf of the state."""
        return state_layout(self, dict(self.run_mesh.shape))

    @cached_property
    def shardings(self) -> TrainState[NamedSharding]:
        """A NamedSharding per leaf of the state."""
        return named(self.run_mesh, self.partitions)

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device: what scalars for the host need."""
        return NamedSharding(self.run_mesh, PartitionSpec())


def state_layout(program: Program, sizes: Mapping[str, int]) -> TrainState[PartitionSpec]:
    """A PartitionSpec per leaf of the state on a mesh of these sizes; the optimizer state lies like its parameters."""
    params = param_partitions(program.specs, program.experiment.rules, sizes)
    opt_state = {}
    for phase in program.phases:
        paths = set(flatten(program.trained(phase)))
        abstract = select(abstract_params(program.specs), paths.__contains__)
        layout = select(params, paths.__contains__)
        opt_state[phase.name] = state_partitions(program.optimizers[phase.name], abstract, layout)
    return TrainState(PartitionSpec(), params, opt_state, PartitionSpec())
