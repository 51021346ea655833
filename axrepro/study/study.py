"""What a study compares. Studies are functions under experiments/ that return a `Study`, found like experiments."""

from dataclasses import dataclass
from typing import Literal, get_args

from axrepro.errors import UserError, require, require_choice, require_positive, require_sizes

Rule = Literal["wall_clock", "step_time", "tokens", "flops"]
RULES: tuple[Rule, ...] = get_args(Rule)
Measure = Literal["step_time", "bits_per_byte", "dropped", "busiest", "router_logits"]
Direction = Literal["falls", "rises", "stays"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the models that are compared: an experiment as the command line names and changes it.

    Attributes:
      label: in tables and figures.
      experiment: its name, as the launcher takes it.
      changes: of its fields, (path, value) pairs of strings as the launcher takes them.
      x: the number that a series varies, where it is one.
    """

    label: str
    experiment: str
    changes: tuple[tuple[str, str], ...] = ()
    x: float | None = None

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Arms of one key are one model, whatever they are called."""
        return self.experiment, self.changes

    @property
    def name(self) -> str:
        """The experiment's, and what is changed."""
        return ",".join([self.experiment, *(f"{path.split('.')[-1]}={value}" for path, value in self.changes)])


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A scale of the ladder: a dense model, and what is compared with it, if anything.

    A rung without mixtures makes the curve of dense models longer, on which all mixtures are read at their step time.
    """

    name: str
    dense: Arm
    sparse: tuple[Arm, ...] = ()

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All, the dense one first."""
        return (self.dense, *self.sparse)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is expected of a measure along a series, from its first arm to its last.

    Attributes:
      measure: "step_time"; held-out "bits_per_byte"; share of choices that were "dropped", and load of the "busiest"
        expert over the mean, both in training at the end; root mean square of the "router_logits".
      direction: "stays" means within 10 % of the first arm.
    """

    measure: Measure
    direction: Direction

    def __post_init__(self):
        require_choice(self, "measure", Measure)
        require_choice(self, "direction", Direction)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Arms that differ in one thing, in its order.

    Attributes:
      name: what is varied.
      dense: what step times are compared with, if anything.
      expected: what theory predicts.
    """

    name: str
    arms: tuple[Arm, ...]
    dense: Arm | None = None
    expected: tuple[Expectation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is forecast for slices that are not there (`--topology`).

    Attributes:
      ladder: at the scales of interest.   series: what is varied on one of them.
    """

    ladder: tuple[Rung, ...] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of mixtures of experts with dense models.

    Attributes:
      ladder: what is trained, by scale.
      rules: how much training a sparse model gets: the same "wall_clock" at the measured step times as the dense model
        of its rung, the same "tokens", or the same model "flops"; or as many steps as a dense model of the same
        "step_time" would get, which is read between two rungs: then wall clock and tokens are equal, too.
      tokens_per_parameter: of the dense models, per parameter outside the embedding (20: Hoffmann et al.,
        arXiv:2203.15556); decides how long they train, unless `hours` is set.
      hours: wall clock of each dense model in place of that.
      seeds: of parameters and data order; every cell is trained with each.
      ablations: series that are trained for `ablation_steps` steps each.
      questions: how many continuations are to be chosen among four.
      rounds, round_steps: how step times are measured: in so many rounds, in which each arm takes so many steps.
      outlook: what is forecast.
    """

    ladder: tuple[Rung, ...]
    rules: tuple[Rule, ...] = RULES
    tokens_per_parameter: float = 20.0
    hours: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    ablations: tuple[Series, ...] = ()
    ablation_steps: int = 400
    questions: int = 400
    rounds: int = 12
    round_steps: int = 10
    outlook: Outlook = Outlook()

    def __post_init__(self):
        require_sizes(self, "ablation_steps", "questions", "rounds", "round_steps")
        require_positive(self, "tokens_per_parameter", "hours")
        require(self, "rules", bool(self.rules) and set(self.rules) <= set(RULES), f"some of {', '.join(RULES)}")
        seeds = set(self.seeds)
        fits = bool(seeds) and len(seeds) == len(self.seeds) and all(0 <= seed < 2**32 for seed in seeds)
        require(self, "seeds", fits, "different numbers from 0 to 4294967295")
        names = [rung.name for rung in self.ladder]
        if len(set(names)) < len(names):
            raise UserError(f"the ladder has two rungs of one name: {', '.join(names)}")
        for rung in (*self.ladder, *self.outlook.ladder):
            labels = [arm.label for arm in rung.arms]
            if len(set(labels)) < len(labels):
                raise UserError(f"the rung {rung.name!r} has two arms of one label: {', '.join(labels)}")

    def trained(self) -> tuple[Arm, ...]:
        """Every arm that is trained, once."""
        arms = [arm for rung in self.ladder for arm in rung.arms]
        arms += [arm for series in self.ablations for arm in series.arms]
        found: dict[tuple, Arm] = {}
        for arm in arms:
            found.setdefault(arm.key, arm)
        return tuple(found.values())
