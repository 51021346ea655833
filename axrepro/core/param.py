"""Parameters, declared once: initial values, counts, shardings and optimizer masks follow from a tree of `Param`."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from axrepro.core.tree import fill, flatten, map_tree, unflatten
from axrepro.errors import UserError

Role = Literal["trained", "frozen", "updated"]
STACKS = ("layers", "expert")
"""The logical axes of `stack`: as the leading dimensions of a parameter they number independent copies of it."""


class Initializer(ABC):
    """How a parameter gets its first value."""

    @abstractmethod
    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        """A value of this shape and dtype."""


@dataclass(frozen=True)
class Normal(Initializer):
    """Gaussian around zero; `std` usually fan_in**-0.5."""

    std: float

    def __call__(self, key, shape, dtype):
        return (self.std * jax.random.normal(key, shape)).astype(dtype)


@dataclass(frozen=True)
class Constant(Initializer):
    """One value everywhere."""

    value: float = 0.0

    def __call__(self, key, shape, dtype):
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform in [-limit, limit)."""

    limit: float

    def __call__(self, key, shape, dtype):
        return jax.random.uniform(key, shape, minval=-self.limit, maxval=self.limit).astype(dtype)


@dataclass(frozen=True)
class Stacked(Initializer):
    """`init` drawn independently for each index of a leading axis: the fan-in never counts that axis."""

    init: Initializer

    def __call__(self, key, shape, dtype):
        return jax.vmap(lambda k: self.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))


@dataclass(frozen=True)
class CopyOf(Initializer):
    """The first value of another parameter of the same tree: EMA teachers and frozen reference models start so."""

    path: str

    def __call__(self, key, shape, dtype):
        raise ValueError(f"CopyOf({self.path!r}) is resolved by init_params and stands for no value by itself")


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter.

    Attributes:
      shape: the full, unsharded shape.
      axes: a logical axis per dimension (None: never sharded); the rules table maps them to mesh axes.
      init: the initial distribution.
      dtype: how it is stored; layers cast it to the compute type where they use it.
      role: "trained" by the optimizer, "frozen", or "updated" by an `Update` that the method returns.
      decay: whether weight decay applies (matrices yes; norms, biases and gates no).
      matmul: whether each element is multiplied into every token that reaches it (False: looked up, or elementwise).
      active: fraction of the elements that one token uses; top_k / num_experts for experts.
      inputs: how many dimensions, after those of stacks, a product with an activation sums over; None: it is no matrix.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: str = "float32"
    role: Role = "trained"
    decay: bool = True
    matmul: bool = True
    active: float = 1.0
    inputs: int | None = None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param of shape {self.shape} needs {len(self.shape)} logical axes, got {self.axes}")
        if any(size < 1 for size in self.shape):
            raise UserError(f"Param has an empty shape {self.shape} (axes {self.axes})")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_stacks(self) -> int:
        """Number of leading dimensions that number layers or experts."""
        return next((index for index, axis in enumerate(self.axes) if axis not in STACKS), len(self.axes))


def linear(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, **kwargs) -> Param:
    """A weight matrix with std fan_in**-0.5; its inputs are the leading dimensions whose product is `fan_in`."""
    inputs = next((count for count in range(1, len(shape)) if math.prod(shape[:count]) == fan_in), None)
    return Param(shape=shape, axes=axes, init=Normal(fan_in**-0.5), inputs=inputs, **kwargs)


def vector(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    value: float,
    *,
    decay: bool = False,
    matmul: bool = False,
    **kwargs,
) -> Param:
    """A norm scale or bias: constant at first, neither decayed nor counted as a matrix product."""
    return Param(shape=shape, axes=axes, init=Constant(value), decay=decay, matmul=matmul, **kwargs)


def stack(specs: Mapping, times: int, axis: str, active: float = 1.0) -> dict:
    """Specs of `times` independent copies along a new leading dimension with logical axis `axis`."""

    def one(path, spec):
        return replace(
            spec,
            shape=(times, *spec.shape),
            axes=(axis, *spec.axes),
            init=spec.init if isinstance(spec.init, CopyOf) else Stacked(spec.init),
            active=spec.active * active,
        )

    return map_tree(one, specs)


def with_role(specs: Mapping, role: Role) -> dict:
    """The same specs in another role, for example a frozen base under an adapter."""
    return map_tree(lambda path, spec: replace(spec, role=role), specs)


def copies_of(specs: Mapping, source: str, role: Role) -> dict:
    """Specs of a copy of the subtree at path `source`, equal at first: an EMA teacher or a frozen reference."""
    return map_tree(lambda path, spec: replace(spec, role=role, init=CopyOf(f"{source}/{path}")), specs)


def init_params(specs: Mapping, key: jax.Array, given: Mapping = MappingProxyType({})) -> dict:
    """Initial values. Each parameter's key depends on its path alone, so adding one changes no other.

    Args:
      given: values that some parameters start with instead; copies of these parameters follow.
    Raises:
      ValueError: if a `CopyOf` names no parameter, or one of another shape.
    """
    flat = flatten(specs)
    values = flatten(given)
    for path, spec in flat.items():
        if path not in values and not isinstance(spec.init, CopyOf):
            values[path] = spec.init(jax.random.fold_in(key, zlib.crc32(path.encode())), spec.shape, spec.dtype)
    for path, spec in flat.items():
        if path not in values:
            if spec.init.path not in values:
                raise ValueError(f"{path!r} is a copy of {spec.init.path!r}, which has no initial value of its own")
            source = values[spec.init.path]
            if source.shape != spec.shape:
                raise ValueError(f"{path!r} {spec.shape} cannot be a copy of {spec.init.path!r} {source.shape}")
            values[path] = source.astype(spec.dtype)
    return fill(specs, unflatten(values))


def abstract_params(specs: Mapping) -> dict:
    """Shapes and dtypes without arrays."""
    return map_tree(lambda path, spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype)), specs)


def count_params(specs: Mapping, active: bool = False) -> int:
    """Number of parameter elements; `active` counts only those that one token uses."""
    return round(sum(spec.size * (spec.active if active else 1) for spec in flatten(specs).values()))


def matmul_flops(specs: Mapping) -> float:
    """Forward FLOPs per token of all matrix products with parameters: 2 per active element."""
    return sum(2.0 * spec.size * spec.active for spec in flatten(specs).values() if spec.matmul)
