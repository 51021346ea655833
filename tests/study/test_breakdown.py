"""The time of a step is told apart by part of the model, from the scopes of its operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro import registry
from axrepro.core.config import override
from axrepro.core.taps import scopes
from axrepro.study.breakdown import PARTS, parts, profiled_parts
from axrepro.train import loop
from axrepro.train.profile import Operation, Summary, instructions

MOVED = {"experts", "router", "dispatch and combine"}


def operation(label: str, seconds: float, kind: str = "matrix products", name: str = "fusion.1") -> Operation:
    return Operation(name, label, kind, seconds, 1)


PLANTED = (
    (operation("layers/0/attention/dot_product_attention/exp (backward)", 1), "attention"),
    (operation("layers/0/attention/q_norm/mul", 2), "attention"),
    (operation("0/attention/dot_product_attention/broadcast_in_dim", 3), "attention"),
    (operation("layers/0/ffn/dot_general (recomputed)", 4), "dense feed-forward"),
    (operation("layers/1/ffn/shared/dot_general", 5), "dense feed-forward"),
    (operation("layers/1/ffn/experts/dot_general", 6), "experts"),
    (operation("layers/1/ffn/router/dot_general", 7), "router"),
    (operation("layers/1/ffn/gather", 8), "dispatch and combine"),
    (operation("1/ffn/iota", 9), "dispatch and combine"),
    (operation("embed/gather", 10), "embedding and head"),
    (operation("head/dot_general (backward)", 11), "embedding and head"),
    (operation("loss/exp", 12), "embedding and head"),
    (operation("layers/1/ffn_norm/mul", 13), "norms and residuals"),
    (operation("norm/rsqrt", 14), "norms and residuals"),
    (operation("layers/1/add", 15), "norms and residuals"),
    (operation("optimizer/sqrt", 16), "optimizer"),
    (operation("layers/1/ffn/experts/psum", 17, "collectives"), "collectives"),
    (operation("add", 18), "rest"),
    (operation("copy.5", 19, "copies", "copy.5"), "rest"),
)


def test_every_scope_has_its_part_and_a_loop_that_waits_for_its_body_has_none():
    waits = operation("layers", 1000, "control flow", "while.1")
    found = parts(Summary([op for op, _ in PLANTED] + [waits], 0, 0), seconds=38.0)
    total = sum(op.seconds for op, _ in PLANTED)
    expected = dict.fromkeys(PARTS, 0.0)
    for op, part in PLANTED:
        expected[part] += op.seconds / total * 38
    assert found == pytest.approx(expected)
    assert list(found) == list(PARTS)


def test_without_experts_a_feed_forward_layer_is_dense():
    summary = Summary([operation("layers/ffn/dot_general", 1), operation("layers/ffn/router/dot_general", 1)], 0, 0)
    assert parts(summary, 3.0) == {"dense feed-forward": 3.0}
    assert parts(Summary([], 0, 0), 3.0) == {}


HLO = """HloModule jit_train_step

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="state.params['head']"}
  %exp.1 = f32[8,8]{1,0} exponential(%x), metadata={op_name="jit(f)/jvp(layers)/ffn/exp"}
  %copy.2 = f32[8,8]{0,1} copy(%exp.1)
  %copy.3 = f32[8,8]{0,1} copy(%x)
  %tuple.4 = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%exp.1, %copy.3)
  %while.5 = (f32[8,8]{1,0}, f32[8,8]{1,0}) while(%tuple.4), metadata={op_name="jit(f)/jvp(layers)/attention/while"}
  %copy.6 = f32[8,8]{1,0} copy(%x)
  %add.7 = f32[8,8]{1,0} add(%x, %copy.6), metadata={op_name="jit(f)/add"}
  ROOT %copy.8 = f32[8,8]{0,1} copy(%x)
}
"""


def test_what_the_compiler_added_has_the_scopes_of_a_neighbour():
    meanings = {name: meaning for name, (meaning, _) in instructions(HLO).items()}
    assert meanings["copy.2"] == "jit(f)/jvp(layers)/ffn/copy"  # of what it takes
    assert meanings["copy.3"] == "jit(f)/jvp(layers)/attention/copy"  # of the loop that it is for
    assert [meanings[name] for name in ("copy.6", "copy.8")] == ["", ""]
    assert meanings["x"] == "state.params['head']"


@pytest.fixture(scope="module")
def of():
    """Parts of two profiled steps of moe_dense's tiny models, of a step of one second; and those of their matrix
    products if each took as long."""

    def measure(name: str) -> tuple[dict[str, float], dict[str, float]]:
        small = {"method.model.dim": 64, "data.sequence_length": 64, "data.batch_size": 8}
        small |= {"method.model.layers.unroll": 1}
        program = loop.build_program(override(registry.load(registry.find(name, registry.index())), small))
        arrays = loop.abstract_batch(program)
        batch = {k: jax.device_put(np.ones(a.shape, a.dtype), a.sharding) for k, a in arrays.items()}
        compiled = loop.compile_step(program, arrays)
        state, found = profiled_parts(compiled, loop.first_state(program), batch, compiled.as_text(), 1.0, steps=2)
        assert int(state.step) == 2
        known = instructions(compiled.as_text()).items()
        products = [operation(scopes(meaning), 1) for _, (meaning, _) in known if meaning.endswith("dot_general")]
        return found, parts(Summary(products, 0, 0), 1.0)

    return {name: measure(name) for name in ("dense_tiny", "moe_tiny")}


def test_the_parts_of_a_real_step_add_up_and_only_a_mixture_moves_tokens(of):
    everywhere = set(PARTS) - MOVED - {"rest"}
    for name, moved in (("dense_tiny", set()), ("moe_tiny", MOVED)):
        found, products = of[name]
        assert sum(found.values()) == pytest.approx(1.0)
        assert found.keys() - {"rest"} == everywhere | moved
        assert products.keys() >= {"attention", "dense feed-forward", "embedding and head"} | (moved & {"experts"})
        assert not products.keys() & {"rest", "norms and residuals"}


def test_a_costly_scope_shows():
    def step(state, batch):
        with jax.named_scope("head"):
            cheap = jnp.tanh(batch @ state)
        with jax.named_scope("attention"):
            for _ in range(12):
                state = jnp.tanh(state @ state)
        return state + cheap.sum(), {}

    state, batch = jnp.ones((256, 256)) / 256, jnp.ones((8, 256))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    _, found = profiled_parts(compiled, state, batch, compiled.as_text(), 2.0)
    assert found["attention"] > 1.6
    assert sum(found.values()) == pytest.approx(2.0)


def test_a_profiler_that_is_taken_is_told_and_the_state_comes_back(tmp_path):
    told = []
    jax.profiler.start_trace(str(tmp_path))
    try:
        state, found = profiled_parts(lambda state, batch: (state, {}), 7, {}, "", 1.0, tell=told.append)
    finally:
        jax.profiler.stop_trace()
    assert (state, found) == (7, {})
    assert len(told) == 1
    assert told[0].startswith("no profile of this step: ")
