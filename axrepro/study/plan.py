"""Which runs a study consists of."""

from collections.abc import Iterator, Mapping, Sequence

from axrepro.study.budget import Between, arm_steps, between, dense_steps
from axrepro.study.measured import cost
from axrepro.study.results import Facts
from axrepro.study.study import Arm, Rule, Rung, Study
from axrepro.study.sweep import Cell, slug


class Plan:
    """The cells of a study: which steps each arm takes under each rule.

    Attributes:
      facts: by slug.   changes: of all experiments.
    """

    def __init__(self, study: Study, facts: Mapping[str, Facts], changes: Mapping[str, str]):
        self._study, self.facts, self.changes = study, facts, changes

    def of(self, arm: Arm) -> Facts:
        """The facts of an arm."""
        return self.facts[slug(arm, self.changes)]

    def steps(self, rung: Rung, arm: Arm, rule: Rule) -> int | None:
        """Of an arm of a rung under a rule; None where the rule says nothing of it."""
        study, dense = self._study, self.of(rung.dense)
        of_dense = cost(dense, dense)
        base = dense_steps(of_dense, dense.outside, study.tokens_per_parameter, study.hours)
        if arm == rung.dense:
            return base
        if rule == "step_time":
            place = self.between(rung, arm)
            return None if place is None else place.steps
        return arm_steps(rule, cost(self.of(arm), dense), of_dense, base)

    def between(self, rung: Rung, arm: Arm) -> Between | None:
        """Where the step time of an arm lies on the curve of the ladder's dense models, whose places are those of the
        rungs; None if no two of them enclose it.
        """
        dense = [self.of(one.dense) for one in self._study.ladder]
        steps = [self.steps(one, one.dense, "step_time") for one in self._study.ladder]
        curve = [(facts.seconds.value, n) for facts, n in zip(dense, steps, strict=True) if n is not None]
        return between(cost(self.of(arm), self.of(rung.dense)).seconds, curve)

    def cell(self, arm: Arm, steps: int, seed: int) -> Cell:
        """A run."""
        return Cell(arm, steps, seed, self.changes)

    def cells(self) -> Iterator[Cell]:
        """All runs, seed by seed, so that what is there of a stopped sweep compares; the ladder comes first."""
        study = self._study
        for seed in study.seeds:
            for rung in study.ladder:
                for arm in rung.arms:
                    for steps in (self.steps(rung, arm, rule) for rule in study.rules):
                        if steps is not None:
                            yield self.cell(arm, steps, seed)
        for seed in study.seeds:
            for series in study.ablations:
                for arm in series.arms:
                    yield self.cell(arm, study.ablation_steps, seed)

    def seconds(self, cells: Sequence[Cell]) -> float:
        """Of the training of these cells, at the measured step times."""
        return sum(self.of(cell.arm).seconds.value * cell.steps for cell in {c.key: c for c in cells}.values())
