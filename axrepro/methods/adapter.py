"""Training a part of a method: chosen parameters, or low-rank adapters beside frozen weights.

Each is a method around another, whatever that is; one line puts it around the method of an experiment:

    swap(experiment, Method, lambda method: LoRA(method=method, rank=8, targets=("**/attention/*",)))
    swap(experiment, Method, lambda method: Freeze(method=method, frozen=("embed/**", "head")))

Parameters keep their paths, so the checkpoint of the plain method gives the first values (`train.init_from`). Frozen
ones take no gradient and no optimizer state.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax

from axrepro.core.context import Context
from axrepro.core.gradients import LossFn
from axrepro.core.interfaces import Flops, Method, Phase
from axrepro.core.param import Constant, Normal, Param, Stacked, matmul_flops
from axrepro.core.tree import fill, flatten, map_tree, matches, unflatten
from axrepro.errors import UserError, nearest
from axrepro.nn.linear import LowRank

Globs = tuple[str, ...]


def _matched(field: str, globs: Globs, paths: Iterable[str]) -> set[str]:
    """The paths that some glob matches. Raises UserError for a glob without a match."""
    paths, matched = list(paths), set()
    for glob in globs:
        found = {path for path in paths if matches(path, glob)}
        if not found:
            hint = nearest(glob.replace("**", "").strip("*/"), paths)
            raise UserError(f"{field}: {glob!r} matches no parameter that it could choose; {hint}")
        matched |= found
    return matched


def _frozen(specs: Mapping, frozen: set[str]) -> dict:
    """The specs with these parameters frozen. Those that the method itself updates or freezes stay as they are."""
    chosen = lambda path, spec: path in frozen and spec.role == "trained"
    return map_tree(lambda path, spec: replace(spec, role="frozen") if chosen(path, spec) else spec, specs)


def _trained(specs: Mapping) -> dict[str, Param]:
    return {path: spec for path, spec in flatten(specs).items() if spec.role == "trained"}


@dataclass(frozen=True, kw_only=True)
class _Around(Method):
    """A method whose objective is that of another, `method`, with other parameters."""

    method: Method

    @abstractmethod
    def plain(self, params: Mapping) -> dict:
        """The parameters as `method` takes them."""

    def loss(self, params: dict, batch: dict[str, jax.Array], ctx: Context) -> dict:
        return self.method.loss(self.plain(params), batch, ctx)

    def evaluate(self, params: dict, batch: dict[str, jax.Array], ctx: Context) -> dict:
        return self.method.evaluate(self.plain(params), batch, ctx)

    def phases(self) -> tuple[Phase, ...]:
        return self.method.phases()

    def gradients(self, loss: LossFn, params: dict, batch: dict, ctx: Context, microbatches: int) -> tuple[dict, dict]:
        return self.method.gradients(loss, params, batch, ctx, microbatches)

    def rollout(self, params: dict, batch: dict[str, jax.Array], ctx: Context) -> dict[str, jax.Array]:
        return self.method.rollout(self.plain(params), batch, ctx)

    def flops(self, batch: Mapping[str, tuple[int, ...]]) -> Flops:
        """Those of `method`, with new weights counted and without the gradients of frozen weights, one product each."""
        before, after = flatten(self.method.specs()), flatten(self.specs())
        new = {path: spec for path, spec in after.items() if path not in before}
        fixed = {path: spec for path, spec in _trained(before).items() if after[path].role == "frozen"}
        first = next(iter(batch.values()))
        tokens = first[0] * (first[1] if len(first) > 1 else 1)
        change = tokens * (3 * matmul_flops(new) - matmul_flops(fixed))
        flops = self.method.flops(batch)
        return Flops(causal=flops.causal + change, full=flops.full + change)

    def check(self, batch: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> None:
        self.method.check(batch, vocab_size)


@dataclass(frozen=True, kw_only=True)
class Freeze(_Around):
    """`method` with some of its parameters frozen.

    Attributes:
      frozen: globs of parameters that stand still.   trained: exceptions from these.
    """

    frozen: Globs = ("**",)
    trained: Globs = ()

    def specs(self) -> dict:
        specs = self.method.specs()
        paths = _trained(specs)
        kept = _matched("Freeze.trained", self.trained, paths)
        return _frozen(specs, _matched("Freeze.frozen", self.frozen, paths) - kept)

    def plain(self, params: Mapping) -> dict:
        return dict(params)


@dataclass(frozen=True, kw_only=True)
class LoRA(_Around):
    """Low-rank adaptation (arXiv:2106.09685, Eq. 3): W + alpha / rank A B with W frozen, A random and B zero at first.

    A and B of the weight at PATH are the parameters PATH_lora_a and PATH_lora_b; they are sharded as the inputs and the
    outputs of W, the rank undivided. Layers and experts of a stack have their own. A product with the weight costs two
    thin products more; W + A B is formed only where a layer multiplies without `nn.linear.matmul` (routers).

    Attributes:
      targets: globs of the weights that get adapters. A table that is looked up is none: list it in `trained`.
      trained: globs of parameters that train in full; all others are frozen.
      dropout: on the inputs of A.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Globs = ("**",)
    trained: Globs = ()
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA takes a rank of at least 1 and a dropout in [0, 1), not {self.rank}, {self.dropout}")

    def _adapted(self, base: Mapping) -> dict[str, Param]:
        """The weights with adapters, by path."""
        trained = _trained(base)
        full = _matched("LoRA.trained", self.trained, trained)
        products = {path: spec for path, spec in trained.items() if spec.inputs is not None and path not in full}
        return {path: products[path] for path in sorted(_matched("LoRA.targets", self.targets, products))}

    def specs(self) -> dict:
        base = self.method.specs()
        flat = flatten(_frozen(base, flatten(base).keys() - _matched("LoRA.trained", self.trained, _trained(base))))
        for path, spec in self._adapted(base).items():
            flat[f"{path}_lora_a"], flat[f"{path}_lora_b"] = _factors(spec, self.rank)
        return unflatten(flat)

    def plain(self, params: Mapping) -> dict:
        base, flat = self.method.specs(), flatten(params)
        values = {path: flat[path] for path in flatten(base)}
        for path in self._adapted(base):
            factors = flat[f"{path}_lora_a"], flat[f"{path}_lora_b"]
            values[path] = LowRank(flat[path], *factors, self.alpha / self.rank, self.dropout, name=path)
        return fill(base, unflatten(values))

    def merged(self, params: Mapping) -> dict:
        """Parameters of `method` that give the same outputs, the adapters added to their weights."""
        return map_tree(lambda path, leaf: leaf.dense() if isinstance(leaf, LowRank) else leaf, self.plain(params))


def _factors(weight: Param, rank: int) -> tuple[Param, Param]:
    """A and B of a weight."""
    assert weight.inputs is not None  # it is a matrix
    stacks, split = weight.num_stacks, weight.num_stacks + weight.inputs
    shape, axes = weight.shape, weight.axes
    random, zero = Normal(math.prod(shape[stacks:split]) ** -0.5), Constant(0.0)
    for _ in range(stacks):
        random = Stacked(random)
    a = replace(weight, shape=(*shape[:split], rank), axes=(*axes[:split], None), init=random, inputs=None)
    shape, axes = (*shape[:stacks], rank, *shape[split:]), (*axes[:stacks], None, *axes[split:])
    return a, replace(weight, shape=shape, axes=axes, init=zero, inputs=None)
