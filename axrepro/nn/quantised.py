"""Products in 8 bits, forward and backward, with a scale for each row and column.

For y = x w, with x[*B, *D] and w[*D, *F], every slice along the contracted *D is divided by its scale s, the largest
magnitude over the largest number of the format, and rounded to nearest; scales do not depend on *D and leave the sum:

  y = s_x s_w (x̂ ŵ),        x̂ = round(x / s_x) of [*B, *D] with s_x[*B],  ŵ = round(w / s_w) of [*D, *F] with s_w[*F]

The backward products contract *F and *B, along which those scales vary. They are multiplied into the gradient g before
it is rounded, so that x̂ and ŵ serve again:

  dx = s_a round(g s_w / s_a) ŵ' with s_a[*B],   dw = s_b x̂' round(s_x g / s_b) with s_b[*F]

Rounding has derivative 1 (straight-through). Accumulation is in int32 or float32, scales are float32.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from axrepro.errors import UserError


@dataclass(frozen=True)
class EightBits:
    """A format.

    Attributes:
      forward: of activations and weights.   gradient: of gradients.
      weight_gradient: whether the product for dw is in 8 bits too, otherwise in the compute type.
    """

    forward: str
    gradient: str
    weight_gradient: bool


FORMATS = {
    # dw sums over all tokens of a batch: too many for int32, and too different for one step size. SwitchBack
    # (arXiv:2304.13013, Sec. 2.2) leaves it in 16 bits too; its weights have one scale for all
    "int8": EightBits("int8", "int8", weight_gradient=False),
    # arXiv:2209.05433, Sec. 3, there with a scale per tensor
    "fp8": EightBits("float8_e4m3fn", "float8_e5m2", weight_gradient=True),
}

# Qwix takes scales below 1e-19 for zero, and gradients of a mean over millions of tokens come near. A power of two
# changes no digit.
_LIFT = 2.0**32


def quantised_product(
    x: Float[Array, "..."], weight: Float[Array, "..."], contracted: int, format: str
) -> Float[Array, "..."]:
    """x[*B, *D] weight[*D, *F] -> float32[*B, *F]; `x` and `weight` in one type, which their gradients get too.

    Args:
      contracted: number of dimensions *D.   format: one of `FORMATS`.
    Raises:
      UserError: if qwix is not installed.
    """
    return _product(x, weight, contracted, FORMATS[format], x.dtype.name)


def _qwix():
    try:
        import qwix
    except ImportError:
        raise UserError(
            "products in 8 bits (train.products.format) need the package qwix: pip install axrepro[quant]"
        ) from None
    return qwix


def _round(x, dtype: str, scaled: range):
    """`x` with a scale for each index of the dimensions `scaled`."""
    # Qwix would put the largest magnitude on 127.5, between two numbers, where the last bit of a division decides
    calibration = f"absmax,{127.5 / 127}" if dtype == "int8" else "absmax"
    return _qwix().quantize(
        x.astype(jnp.float32), jnp.dtype(dtype), channelwise_axes=tuple(scaled), calibration_method=calibration
    )


def _dot(a, b, over_a: range, over_b: range):
    return _qwix().dot_general(a, b, ((tuple(over_a), tuple(over_b)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, weight, contracted, format, dtype):
    return _forward(x, weight, contracted, format, dtype)[0]


def _forward(x, weight, contracted, format, dtype):
    batch, inner = range(x.ndim - contracted), range(x.ndim - contracted, x.ndim)
    rows = _round(x, format.forward, batch)
    columns = _round(weight, format.forward, range(contracted, weight.ndim))
    y = _dot(rows, columns, inner, range(contracted))
    return y, (rows if format.weight_gradient else x, columns)


def _backward(contracted, format, dtype, residuals, g):
    x, columns = residuals
    batch, out = range(x.ndim - contracted), range(x.ndim - contracted, g.ndim)
    shape = g.shape[len(batch) :]
    lifted = _round(g * _LIFT * columns.scale.reshape(shape), format.gradient, batch)
    dx = _dot(lifted, columns.qvalue, out, range(contracted, columns.ndim)) / _LIFT
    if format.weight_gradient:
        lifted = _round(g * _LIFT * x.scale.reshape(*g.shape[: len(batch)], *(1 for _ in shape)), format.gradient, out)
        dw = _dot(x.qvalue, lifted, batch, batch) / _LIFT
    else:
        dw = jax.lax.dot_general(x, g.astype(dtype), ((tuple(batch), tuple(batch)), ((), ())))
    return dx.astype(dtype), dw.astype(dtype)


_product.defvjp(_forward, _backward)
