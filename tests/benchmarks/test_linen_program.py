"""The peer in flax.linen computes what axrepro computes, so that their times may be compared."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from axrepro.core.aux import objective as total
from axrepro.train.loop import build_program
from benchmarks import linen_program
from benchmarks.axrepro_program import experiment
from benchmarks.sizes import Sizes

TINY = Sizes(batch=8, length=32, dim=16, hidden=24, num_layers=2, num_heads=2)


def to_linen(params: dict, sizes: Sizes) -> dict:
    """Our parameters under linen's names."""

    def layer(i):
        ours = jax.tree.map(lambda stacked: stacked[i], params["layers"])
        kernels = lambda weights: {name: {"kernel": weight} for name, weight in weights.items()}
        ffn = ours["ffn"]
        if sizes.num_experts:
            ffn = {"router": {"kernel": ffn["router"]["weight"]}, "experts": kernels(ffn["experts"])}
        else:
            ffn = kernels(ffn)
        return {**ours, "attention": kernels(ours["attention"]), "ffn": ffn}

    layers = {f"layer_{i}": layer(i) for i in range(sizes.num_layers)}
    return {"embed": {"embedding": params["embed"]["table"]}, "norm": params["norm"], **layers}


@pytest.mark.parametrize("num_experts", [0, 8])
def test_the_peer_in_linen_has_the_same_loss_and_gradients(num_experts):
    sizes = replace(TINY, num_experts=num_experts)
    program = build_program(experiment(sizes))
    batch = next(program.experiment.data.batches("train", 0, program.mesh))
    params = program.init(0).params
    ctx = program.context(jax.random.key(0), train=True)
    loss = lambda params: total(program.experiment.method.loss(params, batch, ctx))
    ours, grads = jax.jit(jax.value_and_grad(loss))(params)
    peer = jax.value_and_grad(linen_program.objective, has_aux=True)
    apply_fn = linen_program.Llama(sizes).apply
    (theirs, _), theirs_grads = jax.jit(peer, static_argnums=1)(
        to_linen(params, sizes), apply_fn, batch["tokens"], batch["targets"]
    )
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    for path, grad in jax.tree_util.tree_leaves_with_path(to_linen(grads, sizes)):
        other = theirs_grads
        for key in path:
            other = other[key.key]
        np.testing.assert_allclose(other, grad, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
