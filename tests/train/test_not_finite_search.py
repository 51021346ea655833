"""The first tensor that is not finite is named, for faults planted in a known place."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from faults import Residual, Stack, experiment, set_up

from axrepro.nn import Repeat
from axrepro.train.inspection import Inspector, not_finite
from axrepro.train.loop import build_program, train
from axrepro.train.not_finite import NotFiniteError
from axrepro.train.workdir import Workdir


def with_layer(state, name: str, layer: int, value):
    """The state with one layer's weight replaced."""
    layers = state.params["layers"]
    layers = {**layers, name: layers[name].at[layer].set(value)}
    return replace(state, params={**state.params, "layers": layers})


@pytest.mark.parametrize("settings", [{}, {"grad_accumulation": 4}, {"remat": "full"}], ids=str)
def test_an_overflow_is_found_in_the_layer_that_makes_it(settings):
    program, state, batch = set_up(experiment(**settings))
    inspect = Inspector(program)
    assert list(not_finite(inspect(state, batch))) == []
    for layer, name, found in ((2, "up", "layers[2]/inner/up"), (0, "down", "layers[0]/down")):
        bad = with_layer(state, name, layer, 3e38)
        first, *others = not_finite(inspect(bad, batch))
        assert first == f"activation {found!r}"
        assert others  # everything after it


def test_nan_in_the_data_is_found_before_what_it_spoils():
    program, state, batch = set_up(experiment())
    batch = {**batch, "x": batch["x"].at[3, 2].set(jnp.nan)}
    assert next(not_finite(Inspector(program)(state, batch))) == "batch 'x'"


def test_nan_in_a_parameter_is_found_with_its_layer():
    program, state, batch = set_up(experiment())
    state = with_layer(state, "down", 3, jnp.nan)
    assert next(not_finite(Inspector(program)(state, batch))) == "parameter 'layers/down[3]'"


@pytest.mark.parametrize("layer", [0, 2])
def test_nan_in_the_backward_pass_alone_is_found_where_it_begins(layer):
    program, state, batch = set_up(experiment(Stack(layers=Repeat(layer=Residual(rooted=True), times=4))))
    # the other layers' positive inputs keep away from 0
    positive = jnp.abs(state.params["layers"]["up"]) + 0.1
    state = replace(state, params={**state.params, "layers": {"up": positive, "down": positive}})
    batch = {**batch, "x": jnp.abs(batch["x"]) + 0.1}
    inspect = Inspector(program)
    assert list(not_finite(inspect(state, batch))) == []
    found = list(not_finite(inspect(with_layer(state, "up", layer, 0.0), batch)))
    assert found[0] == f"gradient 'layers/up[{layer}]'"
    assert not any(text.startswith(("activation", "loss", "gradient 'out'")) for text in found)
    assert {text for text in found if "gradient 'layers/down" in text} == {
        f"gradient 'layers/down[{i}]'" for i in range(layer)
    }


def test_a_run_that_stops_names_the_tensor_and_keeps_the_batch(tmp_path):
    config = experiment(rate=1e30)
    with pytest.raises(NotFiniteError, match="step 2 is not finite") as raised:
        train(config, Workdir(str(tmp_path)), "stops")
    message = str(raised.value)
    assert re.search(r"first not finite: (activation|loss) '[^']+'; batch saved to \S+step2\.npz", message), message
    with np.load(tmp_path / "not_finite" / "step2.npz", allow_pickle=False) as saved:
        program = build_program(config)
        batches = config.data.batches("train", config.train.seed, program.mesh, config.rules)
        next(batches)
        for name, value in next(batches).items():
            np.testing.assert_array_equal(saved[name], value)
