"""The same model and step in flax.linen and optax, as one would write them without a library around.

Nothing here is tuned for a platform: products have the shapes of the paper, the mixture is dispatched by one-hot
products as in V-MoE and T5X, and XLA does the rest under `jax.jit` with the state donated.

Axes: B batch, T sequence, D width, H heads, K head dim, E experts, C slots per expert and row, k choices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks.sizes import Sizes

TOP_K, BALANCE, ROUTER_Z = 2, 0.01, 0.001


def rotate(x):
    """RoPE on [B, T, H, K]; dimension i is paired with i + K / 2."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x):
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (nn.DenseGeneral(heads, use_bias=False, name=name)(x) for name in ("q", "k", "v"))
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="out")(y)


class FeedForward(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(self.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(gate) * up)


class MoE(nn.Module):
    """GShard's top-2 over rows, with 2 T / E slots an expert, first choices before second ones."""

    num_experts: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        rows, length, _ = x.shape
        capacity = TOP_K * length // self.num_experts
        logits = nn.Dense(self.num_experts, use_bias=False, name="router")(x)
        probs = nn.softmax(logits)
        gate, expert = jax.lax.top_k(probs, TOP_K)  # [B, T, k]
        gate /= gate.sum(-1, keepdims=True)
        chosen = jax.nn.one_hot(expert, self.num_experts, dtype=jnp.int32)  # [B, T, k, E]
        queue = chosen.swapaxes(1, 2).reshape(rows, TOP_K * length, self.num_experts)
        place = ((jnp.cumsum(queue, axis=1) - queue) * queue).sum(-1)
        slot = place.reshape(rows, TOP_K, length).swapaxes(1, 2)
        slots = jax.nn.one_hot(slot, capacity)  # zeros beyond the capacity
        send = jnp.einsum("btke,btkc->btec", chosen, slots)
        weights = jnp.einsum("btk,btke,btkc->btec", gate, chosen, slots)
        load = chosen[:, :, 0].mean(1)
        self.sow("losses", "balance", BALANCE * self.num_experts * (load * probs.mean(1)).sum(-1).mean())
        self.sow("losses", "router_z", ROUTER_Z * (jax.nn.logsumexp(logits, axis=-1) ** 2).mean())
        experts = nn.vmap(FeedForward, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})
        y = experts(self.hidden, name="experts")(jnp.einsum("btec,btd->becd", send, x))
        return jnp.einsum("btec,becd->btd", weights, y)


class Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        sizes = self.sizes
        x += Attention(sizes.num_heads, name="attention")(nn.RMSNorm(name="attention_norm")(x))
        if sizes.num_experts:
            ffn = MoE(sizes.num_experts, sizes.hidden, name="ffn")
        else:
            ffn = FeedForward(sizes.hidden, name="ffn")
        return x + ffn(nn.RMSNorm(name="ffn_norm")(x))


class Llama(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, tokens):
        sizes = self.sizes
        spread = nn.initializers.normal(sizes.dim**-0.5)
        embed = nn.Embed(sizes.vocab_size, sizes.dim, embedding_init=spread, name="embed")
        x = embed(tokens)
        for i in range(sizes.num_layers):
            x = Block(sizes, name=f"layer_{i}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


def init(sizes: Sizes, seed: int) -> TrainState:
    """The first state; to be run under jit."""
    model = Llama(sizes)
    tokens = jnp.zeros((sizes.batch, sizes.length), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    decay = lambda params: jax.tree.map_with_path(lambda path, p: path[-1].key == "kernel", params)
    adam = optax.adamw(1e-3, b2=0.95, weight_decay=0.1, mask=decay)
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.chain(optax.clip_by_global_norm(1.0), adam))


def objective(params, apply_fn, tokens, targets):
    """Cross entropy and the mixtures' losses, and the accuracy."""
    logits, sown = apply_fn({"params": params}, tokens, mutable="losses")
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    layers = len(sown["losses"]) if "losses" in sown else 1
    loss += sum(jax.tree.leaves(sown)) / layers
    return loss, (logits.argmax(-1) == targets).mean()


def train_step(state: TrainState, tokens, targets):
    """One step, and what is logged of it."""
    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, accuracy), grads = grad(state.params, state.apply_fn, tokens, targets)
    metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.global_norm(grads)}
    return state.apply_gradients(grads=grads), metrics


def make_step(sizes: Sizes) -> Callable[[], float]:
    """A function that takes one step, waits for it, and returns the loss."""
    text = np.random.default_rng(0).integers(0, sizes.vocab_size, (sizes.batch, sizes.length + 1), np.int32)
    tokens, targets = jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])
    state = jax.jit(init, static_argnums=(0, 1))(sizes, 0)
    step = jax.jit(train_step, donate_argnums=0)

    def take():
        nonlocal state
        state, metrics = step(state, tokens, targets)
        jax.block_until_ready(state.params)
        return float(metrics["loss"])

    return take
