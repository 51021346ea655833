"""An optimizer per group of parameters."""

import re
from collections.abc import Hashable
from dataclasses import dataclass

import optax

from axrepro.core.tree import flatten, map_tree, select
from axrepro.errors import UserError, located, require
from axrepro.optim.optimizer import Optimizer, are_pairs, check_globs, first_match


@dataclass(frozen=True, kw_only=True)
class PerPath(Optimizer):
    """An optimizer per group of parameters: `rules=(("**/embed/*", SGD(...)), ("**", AdamW(...)))`.

    The first glob that matches a parameter's path decides. Each rule acts on its own parameters alone: its `clip`
    bounds the norm of their gradients. Without its wildcards the glob names the rule in logs and checkpoints (`embed`;
    `rest` for `**`).
    """

    rules: tuple[tuple[str, Optimizer], ...]

    def __post_init__(self):
        pairs = are_pairs(self.rules, lambda optimizer: isinstance(optimizer, Optimizer))
        require(self, "rules", pairs and bool(self.rules), "pairs of a glob and an optimizer, at least one")
        if any(isinstance(optimizer, PerPath) for _, optimizer in self.rules):
            raise UserError("PerPath.rules holds another PerPath; list its rules among the outer ones")

    def _globs(self) -> tuple[str, ...]:
        return tuple(glob for glob, _ in self.rules)

    def _names(self) -> list[str]:
        names: list[str] = []
        for glob in self._globs():
            name = re.sub(r"[^A-Za-z0-9_-]+", ".", glob).strip(".") or "rest"
            taken = sum(name == re.sub(r"~\d+$", "", other) for other in names)
            names.append(f"{name}~{taken + 1}" if taken else name)
        return names

    def _rule_of(self, path: str) -> int:
        index = first_match(path, self._globs())
        if index is None:
            raise UserError(f"PerPath.rules: no glob matches the parameter {path!r}; add ('**', …) as the last rule")
        return index

    def build(self, specs, steps):
        names = self._names()
        labels = map_tree(lambda path, spec: names[self._rule_of(path)], specs)
        present = set(flatten(labels).values())
        built: dict[Hashable, optax.GradientTransformation] = {}
        for index, (name, (_, optimizer)) in enumerate(zip(names, self.rules, strict=True)):
            if name in present:
                with located(optimizer, f"PerPath.rules.{index}.1"):
                    built[name] = optimizer.build(specs, steps)
        return optax.partition(built, labels)

    def check(self, specs):
        for path in flatten(specs):
            self._rule_of(path)
        check_globs("PerPath.rules", self._globs(), list(flatten(specs)))
        for path, optimizer, own in self.parts(specs):
            with located(optimizer, f"PerPath.{path}"):
                optimizer.check(own)

    def parts(self, specs):
        for index, (_, optimizer) in enumerate(self.rules):
            yield f"rules.{index}.1", optimizer, select(specs, lambda path, i=index: self._rule_of(path) == i)

    def learning_rates(self, state, steps):
        rates = {}
        for name, (_, optimizer) in zip(self._names(), self.rules, strict=True):
            if name in state.inner_states:
                for metric, rate in optimizer.learning_rates(state.inner_states[name].inner_state, steps).items():
                    rates[f"{metric}/{name}"] = rate
        return rates
