"""What is said of an experiment without running it is what running it shows."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from methods import OwnData, Points, TeacherDistillation, TwoPlayers

from axrepro import registry
from axrepro.core import MeshShape
from axrepro.core.aux import Loss, Metric, Update, collect
from axrepro.core.config import override
from axrepro.core.tree import flatten
from axrepro.errors import UserError
from axrepro.optim import AdamW, Constant
from axrepro.train.describe import compare, describe, merged
from axrepro.train.effect import effect
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program

FFN = "method.model.layers.layer.layers.1.ffn"


@cache
def tiny() -> Experiment:
    return registry.load(registry.find("moe_dense:tiny", registry.index()))


def experiment(method) -> Experiment:
    return Experiment(
        method=method,
        data=Points(batch_size=16),
        optimizer=AdamW(learning_rate=Constant(value=0.01)),
        train=Train(steps=10, dtype="float32"),
    )


def difference(old: Experiment, new: Experiment, devices: int = 1) -> list[str]:
    sides = ((name, e, effect(e, f"cpu-{devices}", devices)) for name, e in (("old", old), ("new", new)))
    return compare(*sides).splitlines()


def test_bytes_and_partitions_are_those_of_the_state_on_devices():
    config = replace(tiny(), mesh=MeshShape(data=1, fsdp=4, expert=2))
    said = effect(config, "cpu-8", 8)
    program = build_program(config)
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert said.bytes_per_device["parameters"] == held(state.params) == said.bytes_per_device["gradients"]
    assert said.bytes_per_device["optimizer state"] == held(state.opt_state)
    params = flatten(state.params)
    assert said.parameters.keys() == params.keys()
    for path, parameter in said.parameters.items():
        assert (parameter.shape, parameter.dtype) == (params[path].shape, params[path].dtype)
        assert parameter.partition == params[path].sharding.spec, path
    assert said.total == sum(x.size for x in params.values())
    assert said.mesh == dict(program.mesh.shape)


@pytest.mark.parametrize("method", [TeacherDistillation(), OwnData()], ids=lambda m: type(m).__name__)
def test_names_are_those_that_the_loss_returns(method):
    config = experiment(method)
    said = effect(config, "cpu-8", 8)
    program = build_program(config)
    params = program.init(0).params
    batch = {name: np.ones(x.shape, x.dtype) for name, x in config.data.abstract().items()}
    aux = method.loss(params, batch, program.context(jax.random.key(0), train=True))
    assert (said.losses, said.metrics, said.updates) == tuple(
        tuple(collect(aux, tag)) for tag in (Loss, Metric, Update)
    )
    assert set(said.updates) == {path for path, x in said.parameters.items() if x.role == "updated"}


def test_only_what_trains_has_gradients():
    said = effect(experiment(TeacherDistillation()), "cpu-1", 1)
    assert said.bytes_per_device["parameters"] == 2 * said.bytes_per_device["gradients"]
    assert said.unit == "examples"
    assert said.units == 16


def test_names_of_several_phases_carry_the_phase():
    said = effect(experiment(TwoPlayers()), "cpu-1", 1)
    assert said.losses == ("low/game", "high/game")
    assert said.metrics == ("low/distance", "high/distance")


def test_a_mesh_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="there are 3"):
        effect(override(tiny(), {"mesh.data": 2}), "cpu-3", 3)
    with pytest.raises(UserError, match="multiple of the 2 slices"):
        effect(override(tiny(), {"mesh.data": 1, "mesh.fsdp": 8}), "cpu-8", 8, slices=2)


def test_describing_shows_tree_and_figures():
    shown = describe("tiny", tiny(), "cpu-4", 4, 1, None)
    said = effect(tiny(), "cpu-4", 4)
    assert shown.startswith("tiny: Experiment\n  method: LanguageModel\n")
    for text in (f"{said.total:,} total, {said.active:,} active per token", "512 tokens", "data 4", "cpu-4: 4 devices"):
        assert text in shown


def test_equal_experiments_have_no_difference():
    assert difference(tiny(), replace(tiny()))[1:] == ["no difference"]


def test_a_setting_without_further_effect_differs_in_its_field_alone():
    lines = difference(tiny(), override(tiny(), {"train.seed": 5}))
    assert lines[1:3] == ["fields", "  train.seed: 0 -> 5"]
    assert len(lines) > 8
    assert all(line.endswith(": no difference") for line in lines[3:])


@pytest.mark.parametrize(
    ("assignments", "devices", "expected"),
    [
        ({"method.model.tied": False}, 1, ["+ head (64, 264) embed vocab, trained float32", "+ head whole"]),
        ({f"{FFN}.num_experts": 4}, 1, ["~ layers/1/ffn/experts/up (2, 8, 64, 344) layers expert embed mlp"]),
        ({"mesh.data": 1, "mesh.fsdp": 4}, 4, ["~ mesh.fsdp 1 -> 4", "~ embed/table whole -> - fsdp"]),
        ({"method.z_weight": 1e-4}, 1, ["+ lm_z"]),
        ({"optimizer.moment_dtype": "bfloat16"}, 1, ["~ optimizer state"]),
        ({"data.batch_size": 16}, 1, ["~ tokens 512 -> 1,024", "~ TFLOP, causal", "~ TFLOP, full", "~ batch"]),
    ],
)
def test_each_kind_of_effect_is_compared(assignments, devices, expected):
    there = difference(tiny(), override(tiny(), assignments), devices)
    for text in expected:
        assert any(line.strip().startswith(text) for line in there), (text, there)
    back = difference(override(tiny(), assignments), tiny(), devices)
    assert len(back) == len(there)
    assert [line.replace("+", "-") for line in there if line.startswith("  +")] == [x for x in back if x[:3] == "  -"]


def test_blocks_that_are_alike_share_a_line():
    rows = {
        "layers/0/up": "a",
        "layers/1/up": "a",
        "layers/2/up": "b",
        "layers/0/down": "a",
        "norm": "",
        "0/x/1/y": "a",
    }
    assert merged(rows) == ["layers/{0,1}/up a", "layers/2/up b", "layers/0/down a", "norm", "0/x/1/y a"]
