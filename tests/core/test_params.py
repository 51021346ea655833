"""Parameters: initial values, stacks, copies and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core.param import (
    CopyOf,
    Normal,
    Param,
    Uniform,
    abstract_params,
    copies_of,
    count_params,
    init_params,
    linear,
    matmul_flops,
    stack,
    vector,
    with_role,
)
from axrepro.core.tree import fill, flatten, map_tree, matches, select, unflatten

SPECS = {
    "a": {"w": linear((6, 4), ("embed", "mlp"), fan_in=6), "b": vector((4,), ("mlp",), 0.5)},
    "z": linear((4, 3), ("mlp", None), fan_in=4, dtype="bfloat16"),
    "none": {},  # a layer without parameters
}
KEY = jax.random.key(3)


def test_adding_a_parameter_changes_no_other():
    before = flatten(init_params(SPECS, KEY))
    more = {"0": linear((2, 2), (None, None), fan_in=2), **SPECS, "a": {**SPECS["a"], "c": vector((1,), (None,), 1.0)}}
    after = flatten(init_params(more, KEY))
    assert len(after) == 5
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)


def test_parameters_of_equal_shape_differ_and_the_key_decides():
    specs = {"u": linear((5, 5), (None, None), fan_in=5), "v": linear((5, 5), (None, None), fan_in=5)}
    first, again, other = init_params(specs, KEY), init_params(specs, KEY), init_params(specs, jax.random.key(4))
    assert not np.allclose(first["u"], first["v"])
    np.testing.assert_array_equal(first["u"], again["u"])
    assert not np.allclose(first["u"], other["u"])


def test_values_have_the_declared_shape_dtype_and_distribution():
    params = init_params(SPECS, KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(SPECS)
    )
    assert params["z"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["a"]["b"], 0.5)
    wide = init_params({"w": linear((400, 300), (None, None), fan_in=400)}, KEY)["w"]
    assert abs(wide.std() - 0.05) < 5 * 0.05 / (2 * 120_000) ** 0.5  # five standard errors
    uniform = init_params({"w": Param(shape=(9999,), axes=(None,), init=Uniform(0.2))}, KEY)["w"]
    assert -0.2 <= uniform.min() < -0.199
    assert 0.199 < uniform.max() < 0.2


def test_stacked_copies_differ_and_keep_the_fan_in_of_one():
    # the std must come from fan_in 100; a stack counted as a dimension of the matrix would change it
    matrix = {"w": linear((100, 50), ("embed", "mlp"), fan_in=100)}
    stacked = stack(stack(matrix, 3, "expert", active=2 / 3), 4, "layers")
    spec = stacked["w"]
    assert (spec.shape, spec.axes) == ((4, 3, 100, 50), ("layers", "expert", "embed", "mlp"))
    value = np.asarray(init_params(stacked, KEY)["w"]).reshape(12, -1)
    assert np.unique(value[:, 0]).size == 12
    np.testing.assert_allclose(value.std(1), 0.1, rtol=5 / (2 * 5000) ** 0.5)
    assert np.abs(np.corrcoef(value) - np.eye(12)).max() < 5 / 5000**0.5


def test_a_copy_starts_equal_to_its_source_and_never_shares_its_path():
    specs = {"student": SPECS, "teacher": copies_of(SPECS, "student", "updated")}
    params = init_params(specs, KEY)
    for path, value in flatten(params["teacher"]).items():
        np.testing.assert_array_equal(value, flatten(params["student"])[path])
    assert {spec.role for spec in flatten(specs["teacher"]).values()} == {"updated"}
    assert {spec.role for spec in flatten(specs["student"]).values()} == {"trained"}


def test_a_stack_of_copies_equals_the_stacked_source(assert_close):
    # the copy is of the source as it stands in the whole tree, stacked
    base = stack(SPECS, 2, "layers")
    params = init_params({"base": base, "copy": copies_of(base, "base", "frozen")}, KEY)
    assert_close(params["copy"], params["base"], 0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Param(shape=(6, 4), axes=(None, None), init=CopyOf("a/q")), "'a/q', which has no initial value of its own"),
        (Param(shape=(6, 4), axes=(None, None), init=CopyOf("copy")), "'copy', which has no initial value of its own"),
        (Param(shape=(4, 6), axes=(None, None), init=CopyOf("a/w")), r"\(4, 6\) cannot be a copy of 'a/w' \(6, 4\)"),
    ],
)
def test_impossible_copies_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        init_params({**SPECS, "copy": spec}, KEY)


def test_counts_and_flops_see_what_a_token_uses():
    specs = {
        "table": Param(shape=(100, 8), axes=("vocab", "embed"), init=Normal(1.0), matmul=False),
        "experts": stack({"up": linear((8, 16), ("embed", "mlp"), fan_in=8)}, 4, "expert", active=0.5),
        "scale": vector((8,), (None,), 1.0),
    }
    assert count_params(specs) == 100 * 8 + 4 * 8 * 16 + 8
    assert count_params(specs, active=True) == 100 * 8 + 2 * 8 * 16 + 8
    assert matmul_flops(specs) == 2 * 2 * 8 * 16
    assert all(spec.role == "frozen" for spec in flatten(with_role(specs, "frozen")).values())


def test_ill_formed_parameters_are_refused():
    with pytest.raises(ValueError, match="needs 2 logical axes"):
        Param(shape=(2, 3), axes=("embed",), init=Normal(1.0))
    with pytest.raises(ValueError, match="empty shape"):
        Param(shape=(2, 0), axes=(None, None), init=Normal(1.0))


def test_trees_flatten_in_the_order_of_jax_and_back():
    tree = {"b": {"x": 1, "a": 2}, "a": 3, "c": {}}
    assert list(flatten(tree).items()) == [("a", 3), ("b/a", 2), ("b/x", 1)]
    assert list(flatten(tree).values()) == jax.tree.leaves(tree)
    assert unflatten(flatten(tree)) == {"a": 3, "b": {"a": 2, "x": 1}}
    named = map_tree(lambda path, leaf: f"{path}={leaf}", tree)
    assert named == {"b": {"x": "b/x=1", "a": "b/a=2"}, "a": "a=3", "c": {}}
    assert select(tree, lambda path: path.startswith("b")) == {"b": {"a": 2, "x": 1}}


def test_parts_of_a_tree_fill_its_template_exactly():
    template = {"b": {"x": 0, "a": 0}, "a": 0, "c": {}}
    parts = {"b": {"x": 1}}, {"a": 3, "b": {"a": 2}}
    assert fill(template, *parts) == {"b": {"x": 1, "a": 2}, "a": 3, "c": {}}
    with pytest.raises(ValueError, match="two trees hold 'b/x'"):
        fill(template, *parts, {"b": {"x": 2}})
    with pytest.raises(ValueError, match="'a' is in no part"):
        fill(template, parts[0], {"b": {"a": 2}})
    with pytest.raises(ValueError, match="'d' is in the parts but not in the template"):
        fill(template, *parts, {"d": 2})


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("*", "a/b", False),
        ("**", "a/b/c", True),
        ("**", "", True),
        ("**/ffn/*", "ffn/up", True),
        ("**/ffn/*", "layers/0/ffn/up", True),
        ("**/ffn/*", "layers/xffn/up", False),
        ("generator/**", "generator/a/b", True),
        ("a.b", "axb", False),
        ("layers/*/ffn/up", "layers/12/ffn/up", True),
    ],
)
def test_globs_match_paths(glob, path, expected):
    assert matches(path, glob) is expected
