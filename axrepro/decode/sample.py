"""Sampling by running the whole prefix again for every token: simple, and fast enough for short texts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from axrepro.core.context import Context
from axrepro.models.causal_lm import CausalLM


@functools.partial(jax.jit, static_argnames=("model", "length", "ctx"))
def _sample(model: CausalLM, params, tokens, start, length, key, temperature, eos_id, ctx: Context):
    def body(i, carry):
        tokens, end = carry
        # tokens to come are padding: they take no place in an expert
        inner = ctx.replace(segment_ids=(jnp.arange(length) < i).astype(jnp.int32)[None])
        hidden, _ = model.apply(params, tokens[None], inner)
        logits = model.logits(params, jax.lax.dynamic_slice_in_dim(hidden, i - 1, 1, axis=1), inner)[0, 0]
        token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return tokens.at[i].set(token), jnp.where((token == eos_id) & (end == length), i, end)

    return jax.lax.fori_loop(start, length, body, (tokens, jnp.asarray(length)))


def sample(
    model: CausalLM,
    params: dict,
    prompt: Sequence[int] | np.ndarray,
    length: int,
    *,
    eos_id: int,
    seed: int = 0,
    temperature: float = 0.8,
) -> np.ndarray:
    """The prompt's ids continued up to `length` ids in all, or to the first end-id.

    Args:
      prompt: int[P], at least one id and fewer than `length`.   temperature: divides the logits; 1 samples the model.
    Raises:
      ValueError: if the prompt is empty or too long, or the temperature is not positive.
    """
    if not 0 < len(prompt) < length or temperature <= 0:
        raise ValueError(
            f"a prompt of {len(prompt)} ids, length {length}, temperature {temperature}: need 0 < prompt < length"
        )
    tokens = jnp.zeros(length, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    ctx = Context(dtype="float32", platform=jax.devices()[0].platform.replace("cuda", "gpu"))
    key = jax.random.key(seed)
    tokens, end = _sample(model, params, tokens, len(prompt), length, key, temperature, eos_id, ctx)
    return np.asarray(tokens)[: int(end)]
