"""Statistics by layer equal what numpy computes from a step written out, and looking changes nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import DEPTH, experiment, set_up

from axrepro import registry
from axrepro.core.config import override
from axrepro.core.taps import scopes, tapped
from axrepro.core.tree import flatten
from axrepro.train.inspection import Inspector
from axrepro.train.loop import build_program, train
from axrepro.train.statistics import as_record
from axrepro.train.workdir import Workdir


def by_hand(params, batch):
    """Activations of each layer by a plain loop, as numpy arrays."""
    x, ups, downs = np.asarray(batch["x"], np.float64), [], []
    for i in range(DEPTH):
        ups.append(x @ np.asarray(params["layers"]["up"][i], np.float64))
        downs.append(np.maximum(ups[-1], 0) @ np.asarray(params["layers"]["down"][i], np.float64))
        x = x + downs[-1]
    return {"layers[]/inner/up": ups, "layers[]/down": downs}


def rms(x, axes=None):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axes))


@pytest.mark.parametrize("settings", [{}, {"grad_accumulation": 4, "remat": "full"}], ids=str)
def test_they_are_those_of_a_step_written_out(settings):
    program, state, batch = set_up(experiment(rate=0.5, **settings))
    record = as_record(Inspector(program)(state, batch))
    wanted = by_hand(state.params, batch)
    assert record["activations"].keys() == wanted.keys()
    for name, layers in wanted.items():
        found = record["activations"][name]
        np.testing.assert_allclose(found["rms"], [rms(x) for x in layers], rtol=1e-5)
        np.testing.assert_allclose(found["zeros"], [np.mean(x == 0) for x in layers])
        np.testing.assert_allclose(found["max_abs"], [np.abs(x).max() for x in layers], rtol=1e-5)

    def loss(params):
        x = batch["x"]
        for i in range(DEPTH):
            x = x + jax.nn.relu(x @ params["layers"]["up"][i]) @ params["layers"]["down"][i]
        return jnp.mean((x @ params["out"] - batch["y"]) ** 2)

    params = flatten(state.params)
    for path, grad in flatten(jax.grad(loss)(state.params)).items():
        found, axes = record["parameters"][path], (1, 2) if path.startswith("layers") else None
        np.testing.assert_allclose(found["rms"], rms(params[path], axes), rtol=1e-5)
        np.testing.assert_allclose(found["gradient_rms"], rms(grad, axes), rtol=1e-4)
        np.testing.assert_allclose(found["gradient_max_abs"], np.abs(grad).max(axes), rtol=1e-4)
        # plain gradient descent changes a parameter by the rate times its gradient
        np.testing.assert_allclose(found["update_ratio"], 0.5 * rms(grad, axes) / rms(params[path], axes), rtol=1e-4)


def test_looking_changes_no_loss_and_leaves_a_line_per_look(tmp_path):
    quiet, looking = experiment(), override(experiment(), {"diagnostics.statistics_every": 3})
    one = train(quiet, Workdir(str(tmp_path / "quiet")), "stack")
    other = train(looking, Workdir(str(tmp_path / "looking")), "stack")
    for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(other.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.scalars["loss"] == other.scalars["loss"]
    lines = [json.loads(line) for line in (tmp_path / "looking" / "statistics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert np.shape(lines[0]["parameters"]["layers/up"]["update_ratio"]) == (DEPTH,)
    assert (tmp_path / "looking" / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "quiet" / "statistics.jsonl").exists()


def test_tags_of_a_model_are_heard_in_every_container():
    config = registry.load(registry.find("moe_dense:tiny", registry.index()))
    config = override(config, {"train.remat": "qkvo"})
    program = build_program(config)
    params = jax.eval_shape(program.init, 0).params
    batch = config.data.abstract()
    heard = lambda params, batch: tapped(
        lambda p, b: config.method.loss(p, b, program.context(None, train=True)), lambda x: jnp.max(jnp.abs(x))
    )(params, batch)[1]
    taps = {tap.name: tap.value.shape for tap in jax.eval_shape(heard, params, batch)}
    assert taps["layers[]/0/attention/q"] == (2,)
    assert taps["layers[]/1/ffn/experts/ffn_up"] == (2,)
    assert taps["norm/hidden"] == ()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "jit(train_step)/transpose(jvp(layers))/while/body/closed_call/checkpoint/0/q/dot_general",
            "layers/0/q/dot_general",
        ),
        ("jit(f)/jvp()/mul", "mul"),
        ("jit(f)/layers/vmap(experts)/jit(silu)/logistic", "layers/experts/logistic"),
        ("", ""),
    ],
)
def test_scopes_are_what_is_left_of_a_name_without_the_transformations(text, wanted):
    assert scopes(text) == wanted
