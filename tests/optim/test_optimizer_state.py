"""Partitions of the optimizer's state, from shapes alone."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from axrepro.core.param import Normal, Param, abstract_params
from axrepro.core.sharding import Rules, param_partitions
from axrepro.core.tree import flatten
from axrepro.optim import SGD, Adafactor, AdamW, Constant, PerPath, state_partitions

RATE = Constant(value=0.1)
SIZES = {"fsdp": 4, "model": 2, "expert": 2}


def param(shape, axes):
    return Param(shape=shape, axes=axes, init=Normal(1.0))


SPECS = {
    "wide": param((128, 512), ("embed", "mlp")),
    "square": param((256, 256), ("embed", "mlp")),
    "experts": param((4, 2, 128, 512), ("layers", "expert", "embed", "mlp")),
    "norm": param((128,), ("embed",)),
    "none": {},
}
PARTITIONS = param_partitions(SPECS, Rules(), SIZES)


def partitions_of(config):
    tx = config.build(SPECS, 10)
    partitions = state_partitions(tx, abstract_params(SPECS), PARTITIONS)
    state = jax.eval_shape(tx.init, abstract_params(SPECS))
    assert jax.tree.structure(partitions) == jax.tree.structure(state)
    return partitions


def test_both_moments_of_adamw_mirror_the_parameters_and_counts_are_replicated():
    state = partitions_of(AdamW(learning_rate=RATE))
    assert state["scale_by_adam"].mu == PARTITIONS
    assert state["scale_by_adam"].nu == PARTITIONS
    assert state["scale_by_adam"].count == P()
    assert state["learning_rate"].count == P()


def test_momentum_mirrors_the_parameters():
    assert partitions_of(SGD(learning_rate=RATE))["momentum"].trace == PARTITIONS


def test_factored_moments_drop_the_reduced_dimension():
    moments = partitions_of(Adafactor(learning_rate=RATE))["scale_by_factored_rms"]
    assert PARTITIONS["wide"] == P(("fsdp", "expert"), "model")
    assert moments.v_row["wide"] == P(("fsdp", "expert"))  # a mean over the larger dimension
    assert moments.v_col["wide"] == P("model")
    assert moments.v["wide"] == P()  # a placeholder
    assert PARTITIONS["experts"] == P(None, "expert", "fsdp", "model")
    assert moments.v_row["experts"] == P(None, "expert", "fsdp")
    assert moments.v_col["experts"] == P(None, "expert", "model")
    assert moments.v["norm"] == PARTITIONS["norm"]  # not factored
    assert moments.v_row["norm"] == P()


def test_factored_moments_of_a_square_matrix_are_replicated():
    moments = partitions_of(Adafactor(learning_rate=RATE))["scale_by_factored_rms"]
    assert moments.v_row["square"] == moments.v_col["square"] == P()


def test_each_rule_of_per_path_mirrors_its_own_parameters():
    config = PerPath(rules=(("wide", SGD(learning_rate=RATE)), ("**", AdamW(learning_rate=RATE))))
    states = partitions_of(config).inner_states
    assert states["wide"].inner_state["momentum"].trace["wide"] == PARTITIONS["wide"]
    moments = states["rest"].inner_state["scale_by_adam"].mu
    assert {path: leaf for path, leaf in flatten(moments).items() if isinstance(leaf, P)} == {
        path: leaf for path, leaf in flatten(PARTITIONS).items() if path != "wide"
    }


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (AdamW(learning_rate=RATE), {"scale_by_adam/mu/wide", "scale_by_adam/nu/norm", "learning_rate/count"}),
        (SGD(learning_rate=RATE), {"momentum/trace/wide", "learning_rate/count"}),
        (Adafactor(learning_rate=RATE), {"scale_by_factored_rms/v_row/wide", "learning_rate/count"}),
    ],
)
def test_paths_in_the_state_name_step_and_parameter(config, paths):
    leaves = jax.tree_util.tree_leaves_with_path(partitions_of(config))
    assert paths <= {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
