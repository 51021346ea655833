"""The attention implementations: XLA against plain loops, the others against XLA, value and gradients."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from axrepro.core import MeshShape, make_mesh
from axrepro.errors import UserError
from axrepro.kernels.attention import Mask, attention, exchange, visible
from axrepro.nn import Attention

needs_tokamax = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")


def random_inputs(batch, queries, keys, heads, kv_heads, head_dim, seed=0):
    """q, k, v and a probe for the gradients, float64."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, queries, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2]
    return [rng.normal(size=shape) for shape in [*shapes, shapes[0]]]


def value_and_gradients(inputs, **kwargs):
    def run(q, k, v, probe):
        y, back = jax.vjp(lambda q, k, v: attention(q, k, v, **kwargs), q, k, v)
        return y, *back(probe)

    return jax.jit(run)(*(jnp.asarray(x, jnp.float32) for x in inputs))


def may_see(b, t, s, mask, segments, key_segments, prefix) -> bool:
    """The visibility rule for one pair."""
    if segments is not None:
        key_segments = segments if key_segments is None else key_segments
        if segments[b, t] != key_segments[b, s]:
            return False
    if not mask.causal or (prefix is not None and prefix[b, s]):
        return True
    return s <= t and (mask.window is None or t - s < mask.window)


def loop_attention(q, k, v, mask, segments=None, key_segments=None, prefix=None, cap=None):
    """One query, one head at a time, over the keys it may see; torch tensors, so that gradients follow."""
    group = q.shape[2] // k.shape[2]
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = [s for s in range(k.shape[1]) if may_see(b, t, s, mask, segments, key_segments, prefix)]
            for h in range(q.shape[2]):
                logits = k[b, keys, h // group] @ q[b, t, h] / q.shape[3] ** 0.5
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                rows.append(torch.softmax(logits, 0) @ v[b, keys, h // group])
    return torch.stack(rows).reshape(q.shape)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]])
PREFIX = np.array([[1, 1, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 0, 0]], bool)
MEMORY = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
DEFAULT = {
    "mask": Mask(), "keys": 9, "heads": (4, 2), "segments": None, "key_segments": None, "prefix": None, "cap": None,
}  # fmt: skip
LOOPED = {
    "causal": {},
    "full": {"mask": Mask(causal=False)},
    "window": {"mask": Mask(window=3)},
    "window_of_one": {"mask": Mask(window=1)},
    "segments": {"segments": SEGMENTS},
    "segments_and_window": {"segments": SEGMENTS, "mask": Mask(window=2)},
    "prefix": {"prefix": PREFIX},
    "prefix_and_segments": {"prefix": PREFIX, "segments": SEGMENTS},
    "prefix_and_window": {"prefix": PREFIX, "mask": Mask(window=2)},
    "logit_cap": {"cap": 0.7, "heads": (2, 1)},
    "cross": {"mask": Mask(causal=False), "keys": 5},
    "cross_with_padded_memory": {
        "mask": Mask(causal=False), "keys": 5, "segments": np.ones((2, 9), int), "key_segments": MEMORY,
    },
    "multi_head": {"heads": (2, 2)},
    "multi_query": {"heads": (3, 1)},
}  # fmt: skip


WITH_TOKAMAX = ["window", "segments_and_window", "prefix_and_segments", "prefix_and_window", "logit_cap", "multi_query"]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("xla", name) for name in LOOPED]
    + [("rows", name) for name in LOOPED if name not in ("logit_cap", "window_of_one")]
    + [pytest.param("tokamax", name, marks=needs_tokamax) for name in [*WITH_TOKAMAX, "cross_with_padded_memory"]],
)
def test_implementations_for_any_platform_equal_a_loop(implementation, name, assert_close):
    case = dict(DEFAULT, **LOOPED[name])
    inputs = random_inputs(2, 9, case["keys"], *case["heads"], 4)
    theirs = [torch.tensor(x, requires_grad=True) for x in inputs[:3]]
    parts = case["segments"], case["key_segments"], case["prefix"]
    expected = loop_attention(*theirs, case["mask"], *parts, case["cap"])
    (expected * torch.tensor(inputs[3])).sum().backward()

    segments, key_segments, prefix = (None if x is None else jnp.asarray(x) for x in parts)
    actual, *gradients = value_and_gradients(
        inputs,
        mask=case["mask"],
        segment_ids=segments,
        key_segment_ids=key_segments,
        prefix=prefix,
        logit_cap=case["cap"],
        implementation=implementation,
    )
    # float32 against float64 over at most nine keys of width four
    assert_close(actual, expected.detach().numpy(), 2e-6)
    for ours, reference in zip(gradients, theirs, strict=True):
        assert_close(ours, reference.grad.numpy(), 4e-6)


def test_visible_equals_its_rule_for_every_pair():
    for mask in (Mask(), Mask(window=2), Mask(causal=False)):
        actual = visible(mask, 9, 9, jnp.asarray(SEGMENTS), None, jnp.asarray(PREFIX))
        for b, t, s in np.ndindex(2, 9, 9):
            assert actual[b, t, s] == may_see(b, t, s, mask, SEGMENTS, None, PREFIX), (mask, b, t, s)


@pytest.mark.parametrize("implementation", ["xla", "rows"])
def test_a_query_without_keys_gives_finite_values_and_gradients(implementation):
    segments, key_segments = jnp.array([[1, 1, 1, 7]]), jnp.ones((1, 4), jnp.int32)
    inputs = random_inputs(1, 4, 4, 1, 1, 4)
    options = {"mask": Mask(causal=False), "segment_ids": segments, "key_segment_ids": key_segments}
    results = value_and_gradients(inputs, implementation=implementation, **options)
    assert all(np.isfinite(x).all() for x in results)


def test_a_query_with_one_key_has_no_gradient_but_rounding():
    """Its softmax is constant. `LOOPED` measures relative errors, which a gradient of 0 does not have."""
    _, dq, dk, dv = value_and_gradients(random_inputs(2, 9, 9, 4, 2, 4), mask=Mask(window=1), implementation="rows")
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 2e-6 * np.abs(dv).max()


SPLASH = {
    "causal": {"kv_heads": 2},
    "full_multi_head": {"mask": Mask(causal=False), "kv_heads": 4},
    "window_and_cap": {"mask": Mask(window=50), "cap": 5.0},
    "segments_wide_heads": {"segments": True, "head_dim": 128},
}


@pytest.fixture(scope="module")
def packed_segments():
    """Two rows of 256: three documents and padding; one document that ends off every block edge."""
    segments = np.zeros((2, 256), np.int32)
    segments[0, :70], segments[0, 70:128], segments[0, 128:230] = 1, 2, 3
    segments[1, :201] = 1
    return jnp.asarray(segments)


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_xla(name, packed_segments, assert_close):
    case = dict(mask=Mask(), kv_heads=1, head_dim=64, segments=False, cap=None) | SPLASH[name]
    inputs = random_inputs(2, 256, 256, 4 if case["kv_heads"] > 1 else 2, case["kv_heads"], case["head_dim"])
    kwargs = {
        "mask": case["mask"],
        "logit_cap": case["cap"],
        "segment_ids": packed_segments if case["segments"] else None,
    }
    expected = value_and_gradients(inputs, implementation="xla", **kwargs)
    actual = value_and_gradients(inputs, implementation="splash", **kwargs)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference, 1e-5)  # two float32 softmaxes over 256 keys, blockwise and whole


@pytest.mark.parametrize("segmented", [True, False], ids=["segments", "one_document"])
def test_splash_on_a_mesh_equals_xla_on_one_device(segmented, packed_segments, assert_close):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, expert=2))
    inputs = random_inputs(8, 128, 128, 2, 1, 64)
    kwargs = {
        "mask": Mask(),
        "segment_ids": jnp.tile(packed_segments[:, :128], (4, 1)) if segmented else None,
    }
    expected = value_and_gradients(inputs, implementation="xla", **kwargs)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    inputs = [jax.device_put(x.astype(np.float32), sharding) for x in inputs]
    actual = value_and_gradients(inputs, implementation="splash", sharding=sharding, **kwargs)
    assert actual[0].sharding.is_equivalent_to(sharding, 4)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference, 1e-5)


def test_splash_splits_heads_over_a_model_axis(assert_close):
    mesh = make_mesh(MeshShape(data=2, model=2, fsdp=2))
    inputs = random_inputs(4, 128, 128, 4, 2, 64)
    expected = value_and_gradients(inputs, implementation="xla", mask=Mask())
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "model"))
    actual = value_and_gradients(inputs, implementation="splash", sharding=sharding, mask=Mask())
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference, 1e-5)


def shaped(length=128, head_dim=64, dtype=jnp.float32):
    return [jnp.zeros((1, length, 2, head_dim), dtype)] * 3


@pytest.mark.parametrize(
    ("implementation", "inputs", "options", "message"),
    [
        ("splash", shaped(), {"prefix": jnp.zeros((1, 128), bool)}, "does not support a prefix"),
        ("splash", shaped(length=100), {}, "multiples of 128 .* T=100"),
        ("splash", shaped(head_dim=32), {}, "head_dim=32"),
        ("rows", shaped(), {"logit_cap": 30.0}, "does not support a logit cap"),
        ("cudnn", shaped(dtype=jnp.bfloat16), {"logit_cap": 30.0}, "does not support a logit cap"),
        ("cudnn", shaped(), {}, "16-bit inputs .* not float32"),
        ("cudnn", shaped(head_dim=256, dtype=jnp.bfloat16), {}, "head_dim=256"),
        ("splosh", shaped(), {}, "did you mean 'splash'"),
        ("auto", shaped(), {"context_parallel": "rong"}, "unknown context_parallel='rong'; did you mean 'ring'"),
        ("xla", [jnp.zeros((1, 4, 3, 8)), *[jnp.zeros((1, 4, 2, 8))] * 2], {}, "3 query heads are no multiple of 2"),
    ],
)
def test_what_an_implementation_lacks_is_an_error_that_names_it(implementation, inputs, options, message, unchecked):
    with pytest.raises(UserError, match=message):
        attention(*inputs, mask=Mask(), implementation=implementation, **options)


def test_a_memory_of_uneven_length_is_refused_by_splash_and_left_to_xla_by_auto():
    q, memory = shaped()[0], shaped(length=100)[0]

    def shape(**options):
        call = lambda q, k: attention(q, k, k, mask=Mask(causal=False), platform="tpu", **options)
        return jax.eval_shape(call, q, memory).shape

    assert shape(implementation="auto") == q.shape
    with pytest.raises(UserError, match="multiples of 128"):
        shape(implementation="splash")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_falls_back_to_xla_where_the_fast_one_lacks_a_feature(platform):
    prefix = jnp.zeros((1, 128), bool)
    y = attention(*shaped(), mask=Mask(), prefix=prefix, implementation="auto", platform=platform)
    assert y.shape == (1, 128, 2, 64)


def test_impossible_masks_and_heads_are_refused():
    with pytest.raises(ValueError, match="window=0"):
        Mask(window=0)
    with pytest.raises(ValueError, match=r"window=4: it takes none where causal=False"):
        Mask(causal=False, window=4)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        Attention(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="cross-attention takes rope=None"):
        Attention(num_heads=4, cross=True)
    with pytest.raises(UserError, match="set head_dim"):
        Attention(num_heads=4).specs(30)


SPLIT = {
    "causal": {"shards": 4, "model": 2},
    "causal_odd_parts": {"shards": 8, "segments": True},
    "segments_and_cap": {"shards": 4, "model": 2, "segments": True, "cap": 0.7},
    "window": {"shards": 8, "mask": Mask(window=5), "segments": True},
    "wide_window": {"shards": 4, "mask": Mask(window=17)},
    "prefix": {"shards": 4, "segments": True, "prefix": True},
    "full": {"shards": 2, "model": 2, "mask": Mask(causal=False)},
    "cross_with_a_memory_that_is_all_padding": {"shards": 4, "mask": Mask(causal=False), "memory": True},
}


@pytest.mark.parametrize("context_parallel", ["gather", "ring"])
@pytest.mark.parametrize("name", SPLIT)
def test_a_split_sequence_gives_what_one_device_does(name, context_parallel, assert_close, monkeypatch):
    monkeypatch.setattr("axrepro.kernels.ring_attention.TILE", 4)  # several tiles on a device
    case = dict(mask=Mask(), model=1, cap=None, segments=False, prefix=False, memory=False) | SPLIT[name]
    inputs = random_inputs(2, 24, 8 if case["memory"] else 24, 4, 1, 4)
    segments = jnp.asarray(np.stack([np.arange(24) // 7, np.arange(24) // 13]), jnp.int32)
    kwargs = {
        "mask": case["mask"],
        "logit_cap": case["cap"],
        "segment_ids": jnp.ones((2, 24), jnp.int32) if case["memory"] else segments if case["segments"] else None,
        "key_segment_ids": jnp.asarray([[1, 1, 1, 1, 1, 1, 0, 0], [0] * 8]) if case["memory"] else None,
        "prefix": jnp.asarray(np.random.default_rng(3).random((2, 24)) < 0.3) if case["prefix"] else None,
    }
    shards, model = case["shards"], case["model"]
    mesh = make_mesh(MeshShape(data=1, seq=shards, model=model), jax.devices()[: shards * model])
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq", "model" if model > 1 else None))
    expected = value_and_gradients(inputs, implementation="xla", **kwargs)
    actual = value_and_gradients(inputs, sharding=sharding, context_parallel=context_parallel, **kwargs)
    assert actual[0].sharding.is_equivalent_to(sharding, 4)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference, 2e-6)  # float32 sums over 24 keys in another order


@pytest.mark.parametrize("mask", [Mask(), Mask(window=100), Mask(causal=False)], ids=str)
def test_splash_takes_its_share_of_the_queries_of_a_split_sequence(mask, assert_close):
    mesh = make_mesh(MeshShape(data=1, seq=2, model=2), jax.devices()[:4])
    inputs = random_inputs(1, 512, 512, 2, 1, 64)
    segments = jnp.asarray(np.arange(512)[None] // 300)
    kwargs = {"mask": mask, "segment_ids": segments, "key_segment_ids": segments}
    expected = value_and_gradients(inputs, implementation="xla", **kwargs)
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq", "model"))
    actual = value_and_gradients(inputs, implementation="splash", sharding=sharding, **kwargs)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference, 1e-5)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_an_exchange_gives_each_device_an_early_and_a_late_part(devices):
    mesh = make_mesh(MeshShape(data=1, seq=devices), jax.devices()[:devices])
    spec = PartitionSpec(None, "seq")
    there = jax.shard_map(lambda x: exchange(x, "seq"), mesh=mesh, in_specs=spec, out_specs=spec)
    back = jax.shard_map(lambda x: exchange(x, "seq", back=True), mesh=mesh, in_specs=spec, out_specs=spec)
    x = jnp.arange(4 * devices)[None]  # parts of two
    parts = np.asarray(there(x)).reshape(devices, 2, 2)[:, :, 0] // 2
    np.testing.assert_array_equal(parts, [(i, 2 * devices - 1 - i) for i in range(devices)])
    np.testing.assert_array_equal(back(there(x)), x)
