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
from axrepro.core.tree import fill, flatten, matches, select
from axrepro.errors import UserError, located
from axrepro.optim import Average, state_partitions
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
      skips: int32, steps that were not finite: "total", and "in_row", those up to this one without a break.
      average: state of `Experiment.average`, {} where that is None.
    """

    step: Leaf
    params: dict
    opt_state: dict
    key: Leaf
    skips: dict
    average: dict


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
    def trained_specs(self) -> dict:
        """All that has the role "trained", in whatever phase."""
        flat = flatten(self.specs)
        return select(self.specs, lambda path: flat[path].role == "trained")

    @cached_property
    def trained_paths(self) -> frozenset[str]:
        """The parameters that some phase trains."""
        return frozenset(path for phase in self.phases for path in flatten(self.trained(phase)))

    @cached_property
    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """The optimizer of each phase. Raises UserError if a pattern in it matches no parameter."""
        config, steps = self.experiment.optimizer, self.experiment.train.steps
        with located(config, "optimizer"):
            config.check(self.trained_specs)
            return {phase.name: config.build(self.trained(phase), steps) for phase in self.phases}

    def learning_rates(self, opt_state: dict, phase: Phase) -> dict[str, jax.Array]:
        """The rates of the next update of a phase, by metric name."""
        return self.experiment.optimizer.learning_rates(opt_state[phase.name], self.experiment.train.steps)

    @cached_property
    def average(self) -> Average | None:
        """The average, checked."""
        average = self.experiment.average
        if average is not None:
            with located(average, "average"):
                average.check(self.experiment.train.steps)
        return average

    def averaged(self, params: dict, average: dict) -> dict:
        """The parameters to evaluate: the trained ones averaged (where there is an average), all others as they are."""
        if self.average is None:
            return params
        rest = select(params, lambda path: path not in self.trained_paths)
        return fill(self.specs, self.average.params(average, self._trained_part(params)), rest)

    def next_average(self, state: TrainState, params: dict) -> dict:
        """The state of the average after the step from `state` to these parameters."""
        if self.average is None:
            return {}
        trained, steps = self._trained_part(params), self.experiment.train.steps
        return self.average.update(state.average, trained, state.step + 1, steps)

    def _trained_part(self, tree: Mapping) -> dict:
        return select(tree, self.trained_paths.__contains__)

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
        average = {} if self.average is None else self.average.init(self._trained_part(params))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, opt_state, jax.random.fold_in(key, 1), {"total": zero, "in_row": zero}, average)

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
    """A PartitionSpec per leaf of the state on a mesh of these sizes; what belongs to a parameter lies like it."""
    params = param_partitions(program.specs, program.experiment.rules, sizes)
    opt_state = {}
    for phase in program.phases:
        paths = set(flatten(program.trained(phase)))
        abstract = select(abstract_params(program.specs), paths.__contains__)
        layout = select(params, paths.__contains__)
        opt_state[phase.name] = state_partitions(program.optimizers[phase.name], abstract, layout)
    whole = PartitionSpec()
    trained = select(params, program.trained_paths.__contains__)
    average = {} if program.average is None else program.average.partitions(trained)
    return TrainState(whole, params, opt_state, whole, {"total": whole, "in_row": whole}, average)
