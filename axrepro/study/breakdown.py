"""What the time of a step goes to by part of the model, from a profile of some steps."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from axrepro.train.profile import Operation, Profiler, Summary

PARTS = (
    "attention",
    "dense feed-forward",
    "experts",
    "router",
    "dispatch and combine",
    "embedding and head",
    "norms and residuals",
    "optimizer",
    "collectives",
    "rest",
)
_BY_SCOPE = {
    "attention": "attention",
    "dot_product_attention": "attention",
    "ffn": "dense feed-forward",
    "embed": "embedding and head",
    "head": "embedding and head",
    "loss": "embedding and head",
    "norm": "norms and residuals",
    "optimizer": "optimizer",
}
_IN_MIXTURE = {"router": "router", "experts": "experts", "shared": "dense feed-forward"}
_Path = tuple[str, ...]


def parts(summary: Summary, seconds: float) -> dict[str, float]:
    """Seconds of a step by those of `PARTS` that took some; they add up to `seconds`.

    They are shares of the operations' self times: on CPU several threads work at once, and on accelerators what runs
    beside other work counts in full. Outermost scopes decide. A layer with a scope "experts" inside is a mixture; what
    in it is neither router nor experts moves tokens to them and back. "norms and residuals" is all else of the stack of
    layers, slices of stacked weights included, "rest" what carries no scope.
    """
    works = [(op, _path(op)) for op in summary.operations if op.kind != "control flow"]  # which waits for its body
    mixtures = {path[:i] for _, path in works for i, scope in enumerate(path) if scope == "experts"}
    total = sum(op.seconds for op, _ in works) or 1.0
    found: dict[str, float] = defaultdict(float)
    for op, path in works:
        found["collectives" if op.kind == "collectives" else _part(path, mixtures)] += op.seconds / total * seconds
    return {part: found[part] for part in PARTS if found[part]}


def profiled_parts(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch: Any,
    text: str,
    seconds: float,
    steps: int = 3,
    tell: Callable[[str], None] = print,
) -> tuple[Any, dict[str, float]]:
    """Takes some steps under the profiler.

    Args:
      step: compiled, (state, batch) -> (state, anything); the state may be donated.   text: of the compiled program.
      seconds: of a step, as measured without the profiler.
    Returns:
      The state after the steps, and `parts`; {} where the platform has no profile to give, which is told.
    """
    with tempfile.TemporaryDirectory(prefix="axrepro_profile_") as folder:
        profiler = Profiler(Path(folder))
        try:
            profiler.start(1)
        except RuntimeError as error:
            tell(f"no profile of this step: {error}")
            return state, {}
        for _ in range(steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        try:
            found = parts(profiler.end(text), seconds)
        except (RuntimeError, ValueError, OSError) as error:
            tell(f"no profile of this step: {error}")
            return state, {}
    if not found:
        tell("no profile of this step: its trace names no operations")
    return state, found


def _path(op: Operation) -> _Path:
    """The scopes of an operation, and its primitive at the end; () for one without."""
    if op.label == op.name:
        return ()
    return tuple(op.label.split(" (")[0].split("/"))


def _part(path: _Path, mixtures: set[_Path]) -> str:
    for i, scope in enumerate(path):
        branch = path[: i + 1]
        # what is hoisted out of a loop has lost its outer scopes
        if any(mixture[-len(branch) :] == branch for mixture in mixtures):
            return next((_IN_MIXTURE[s] for s in path[i + 1 :] if s in _IN_MIXTURE), "dispatch and combine")
        if scope in _BY_SCOPE:
            return _BY_SCOPE[scope]
        if scope.endswith("_norm"):
            return "norms and residuals"
    return "norms and residuals" if path[:1] == ("layers",) else "rest"
