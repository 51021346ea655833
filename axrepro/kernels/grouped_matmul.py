"""Products of groups of rows with a matrix each: what dropless experts are made of.

Axes: R rows, E groups, D and F widths. The rows of one group lie together, the groups in order.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from axrepro.errors import UserError, nearest
from axrepro.kernels.tokamax_package import load_tokamax

Implementation = Literal["auto", "ragged_dot", "megablox", "tokamax", "loop"]
_AUTO: dict[str, Implementation] = {"cpu": "loop", "gpu": "tokamax", "tpu": "megablox"}
_PLATFORMS = {"megablox": ("tpu",), "tokamax": ("gpu", "cpu"), "loop": ("cpu",)}


def grouped_matmul(
    x: Float[Array, "R D"],
    weight: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    dtype=None,
    implementation: Implementation = "auto",
    platform: str = "cpu",
) -> Float[Array, "R F"]:
    """y[r] = x[r] weight[g] for each row r of group g; zeros for rows beyond the last group.

    Args:
      sizes: rows per group; their sum is at most R.
      dtype: of accumulation and result; None: that of the operands.
      implementation: "ragged_dot" is the compiler's own, "megablox" jax's Pallas kernel for TPUs, "tokamax" that
        library's for GPUs, "loop" blocks of rows with ordinary products, because on CPU XLA multiplies all rows
        with all matrices; on TPU it does so for the gradient of the matrices. "auto" takes "loop" on CPU, "tokamax"
        on GPU, "megablox" on TPU.
      platform: what the program is compiled for.
    Raises:
      UserError: for an implementation that the platform does not have.
    """
    chosen = _AUTO[platform] if implementation == "auto" else implementation
    if chosen not in get_args(Implementation):
        raise UserError(f"unknown grouped product {chosen!r}; {nearest(chosen, get_args(Implementation))}")
    if platform not in _PLATFORMS.get(chosen, (platform,)):
        raise UserError(f'the grouped product "{chosen}" does not run on {platform}; use "auto" or "ragged_dot"')
    dtype = jnp.dtype(dtype or x.dtype)
    x = _known(x, sizes)
    if chosen == "loop":
        y = _loop(x, weight, sizes, dtype)
    elif chosen == "megablox":
        y = _megablox(x, weight, sizes, dtype)
    elif chosen == "tokamax":
        y = load_tokamax().ragged_dot(x, weight, sizes, preferred_element_type=dtype)
    else:
        y = jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=dtype)
    return _only_known(y, sizes)


def _only_known(rows, sizes):
    """Zeros for rows beyond the last group, which kernels leave unwritten."""
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], rows, 0)


@jax.custom_vjp
def _known(x, sizes):
    """x, with a gradient of zero for rows beyond the last group."""
    return x


_known.defvjp(lambda x, sizes: (x, sizes), lambda sizes, g: (_only_known(g, sizes), None))


def _megablox(x, weight, sizes, dtype):
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

    rows, (inner, out) = x.shape[0], weight.shape[1:]
    up = lambda size, most: min(most, -(-size // 128) * 128)
    tiling = (up(rows, 512), up(inner, 1024), up(out, 1024))
    x = jnp.pad(x, ((0, -rows % tiling[0]), (0, 0)))
    return gmm(x, weight, sizes, dtype, tiling)[:rows]


# ---- blocks of rows, for CPU ----

_BLOCKS = (1024, 512, 256, 128, 64, 32)


def _for_blocks(start, size, rows: int, carry, body):
    """`body(at, mine, carry)` for blocks of `rows` rows that cover those of a group.

    A block is read from row `at` on; `mine` says which of its rows are the group's and in no block before: a
    block may reach beyond the group, and where that would be beyond the array it begins earlier.
    Largest blocks first, and a last block that wastes no more than an eighth of the group: few rows are computed in
    vain, and most in products that are large enough.
    """
    blocks = [block for block in _BLOCKS if block <= rows] or [rows]
    done = jnp.zeros((), jnp.int32)
    for block in blocks:
        left = jnp.maximum(size - done, 0)
        over = -(-left // block)
        enough = (block == blocks[-1]) | (8 * (over * block - left) <= size)
        times = jnp.where(enough, over, left // block)

        def step(i, carry, block=block, done=done):
            first = start + done + i * block
            at = jnp.minimum(first, rows - block)
            row = at + jnp.arange(block)[:, None]
            return body(at, (row >= first) & (row < start + size), carry)

        carry = jax.lax.fori_loop(0, times, step, carry)
        done += times * block
    return carry


def _products(x, weight, sizes, dtype, transposed: bool):
    """x[r] weight[g], or its transpose; rows beyond the last group are arbitrary."""
    starts = jnp.cumsum(sizes) - sizes
    rows = x.shape[0]

    def group(g, out):
        matrix = jax.lax.dynamic_index_in_dim(weight, g, keepdims=False)

        def body(at, mine, out):
            block = jax.lax.dynamic_slice_in_dim(x, at, mine.shape[0])
            dims = ((1,), (1 if transposed else 0,)), ((), ())
            y = jax.lax.dot_general(block, matrix, dims, preferred_element_type=dtype)
            kept = jax.lax.dynamic_slice_in_dim(out, at, mine.shape[0])
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, kept), at, 0)

        return _for_blocks(starts[g], sizes[g], rows, out, body)

    out = jnp.zeros((rows, weight.shape[1 if transposed else 2]), dtype)
    return jax.lax.fori_loop(0, sizes.shape[0], group, out)


def _weight_gradient(x, g, sizes):
    starts = jnp.cumsum(sizes) - sizes

    def group(index, out):
        def body(at, mine, out):
            rows = jax.lax.dynamic_slice_in_dim(x, at, mine.shape[0])
            grads = jnp.where(mine, jax.lax.dynamic_slice_in_dim(g, at, mine.shape[0]), 0)
            dims = ((0,), (0,)), ((), ())
            product = jax.lax.dot_general(rows, grads, dims, preferred_element_type=out.dtype)
            total = jax.lax.dynamic_index_in_dim(out, index, keepdims=False) + product
            return jax.lax.dynamic_update_index_in_dim(out, total, index, 0)

        return _for_blocks(starts[index], sizes[index], x.shape[0], out, body)

    # a sum over the blocks of a group, so in float32
    out = jnp.zeros((sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, sizes.shape[0], group, out)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loop(x, weight, sizes, dtype):
    return _products(x, weight, sizes, dtype, transposed=False)


def _loop_forward(x, weight, sizes, dtype):
    return _loop(x, weight, sizes, dtype), (x, weight, sizes)


def _loop_backward(dtype, residuals, g):
    x, weight, sizes = residuals
    g = g.astype(x.dtype)
    x_gradient = _products(g, weight, sizes, x.dtype, transposed=True)
    return x_gradient, _weight_gradient(x, g, sizes).astype(weight.dtype), None


_loop.defvjp(_loop_forward, _loop_backward)
