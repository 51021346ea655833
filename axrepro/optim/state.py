"""Where the optimizer's state lies: beside the parameters that it belongs to."""

from collections.abc import Mapping

import jax
import optax
from jax.sharding import PartitionSpec


def _reduced(shape: tuple[int, ...], kept: tuple[int, ...], partition: PartitionSpec) -> PartitionSpec:
    """The partition of a mean of a parameter over one dimension.

    Where several dimensions could have been reduced (a square matrix), an entry stays only if all of them agree on it.
    """
    entries = (*partition, *[None] * (len(shape) - len(partition)))
    drop = lambda values, axis: (*values[:axis], *values[axis + 1 :])
    candidates = [drop(entries, axis) for axis in range(len(shape)) if drop(shape, axis) == kept]
    agreed = [of_one[0] if len(set(of_one)) == 1 else None for of_one in zip(*candidates, strict=True)]
    while agreed and agreed[-1] is None:
        agreed.pop()
    return PartitionSpec(*agreed)


def state_partitions(transform: optax.GradientTransformation, abstract_params: Mapping, param_partitions: Mapping):
    """A PartitionSpec per leaf of the state of `transform`; no arrays are made.

    A leaf that mirrors a parameter gets that parameter's partition, a factored moment the same without the dimension
    it averages, everything else (step counts, placeholders) is replicated.

    Args:
      transform: what `Optimizer.build` returned.
      abstract_params: shapes of the trained parameters.   param_partitions: their PartitionSpecs, same structure.
    """
    abstract_state = lambda params: jax.eval_shape(transform.init, params)

    def one(leaf, param, partition):
        if isinstance(leaf, optax.MaskedNode):  # belongs to another rule of a PerPath
            return leaf
        if leaf.shape == param.shape:
            return partition
        return _reduced(param.shape, leaf.shape, partition)

    return optax.tree_map_params(
        abstract_state,
        one,
        abstract_state(abstract_params),
        abstract_params,
        param_partitions,
        transform_non_params=lambda leaf: PartitionSpec(),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
