"""Overriding, swapping, printing and exchanging config trees."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pytest
from ml_collections import ConfigDict

from axrepro.core import describe, override, swap
from axrepro.core.config import differences, from_config_dict, to_config_dict, to_json, walk
from axrepro.errors import UserError
from axrepro.nn import (
    Attention,
    Block,
    FeedForward,
    LayerNorm,
    MoE,
    Repeat,
    RMSNorm,
    RoPE,
    RouterLosses,
    Sequence,
    every,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    size: int | None = None
    act: Literal["silu", "relu"] = "silu"


@dataclass(frozen=True, kw_only=True)
class Rule:
    match: str
    value: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    steps: int = 10
    name: str = "run"
    on: bool = False
    shape: tuple[int, ...] = (2, 3)
    pair: tuple[str, float] = ("a", 1.0)
    rules: tuple[Rule, ...] = (Rule(match="x"), Rule(match="y"))
    optional: Inner | None = None

    def __post_init__(self):
        if self.steps < self.shape[0]:
            raise ValueError(f"steps={self.steps} must be at least shape[0]={self.shape[0]}")


@dataclass(frozen=True, kw_only=True)
class Functions:
    many: tuple[Callable, ...]
    one: Callable


def blocks(times: int) -> Repeat:
    return Repeat(layer=Block(attention=Attention(num_heads=2), ffn=FeedForward(hidden=8)), times=times)


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("steps", "1_000", 1000),
        ("steps", 12, 12),
        ("inner.rate", "1e-3", 1e-3),
        ("inner.rate", "3", 3.0),
        ("inner.rate", 3, 3.0),
        ("inner.size", "7", 7),
        ("inner.size", 7, 7),
        ("inner.act", "relu", "relu"),
        ("name", "42", "42"),
        ("on", "true", True),
        ("on", "0", False),
        ("shape", "(4, 5, 6)", (4, 5, 6)),
        ("shape", [4, 5], (4, 5)),
        ("pair", "b,2", ("b", 2.0)),
        ("rules.1.value", "3", 3.0),
    ],
)
def test_override_reads_text_as_the_type_of_the_field(path, given, expected):
    value = override(Outer(), {path: given})
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_override_changes_nothing_else():
    changed = override(Outer(), {"rules.1.match": "z", "inner.size": 3})
    assert changed == Outer(inner=Inner(size=3), rules=(Rule(match="x"), Rule(match="z")))
    assert override(changed, {"inner.size": "none"}).inner.size is None
    assert override(Outer(), {}) == Outer()


def test_override_applies_assignments_that_need_each_other_at_once():
    # either alone would be refused by the class
    assert override(Outer(), {"steps": "100", "shape": "50,1"}).shape == (50, 1)
    assert override(Outer(), {"shape": "50,1", "steps": "100"}).steps == 100


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"stepz": "1"}, r"Outer has no field 'stepz'; did you mean 'steps'\?"),
        ({"inner.rat": "1"}, r"Inner \(at inner\) has no field 'rat'; did you mean 'rate'\?"),
        ({"iner.rate": "1"}, r"Outer has no field 'iner'; did you mean 'inner'\?"),
        ({"rules.7.match": "1"}, r"no field '7'"),
        ({"steps.more": "1"}, r"steps is a value, not a group of fields"),
        ({"inner": "1"}, r"inner is a Inner, which has no single value; set one of its fields: inner\.rate"),
        ({"steps": "many"}, r"steps='many' has the wrong type; it takes int"),
        ({"steps": "1.5"}, r"steps='1\.5' has the wrong type; it takes int"),
        ({"steps": 1.5}, r"steps=1\.5 has the wrong type; it takes int"),
        ({"steps": True}, r"steps=True has the wrong type"),
        ({"inner.rate": True}, r"inner\.rate=True has the wrong type; it takes float"),
        ({"on": "yes"}, r"on='yes' has the wrong type; it takes bool"),
        ({"inner.size": "x"}, r"it takes int or none"),
        ({"inner.act": "tanh"}, r"it takes one of silu, relu"),
        ({"pair": "a,1,2"}, r"pair='a,1,2' has the wrong type"),
        ({"steps": "1"}, r"steps=1 must be at least shape\[0\]=2"),
    ],
)
def test_a_wrong_override_is_an_error_that_says_what_is_right(assignment, message):
    with pytest.raises(UserError, match=message):
        override(Outer(), assignment)


@dataclass(frozen=True)
class Plain:
    """Without fields."""


@pytest.mark.parametrize(
    ("path", "fault"),
    [("optional", "optional is a Plain, which has no single value"),
     ("optional.rate", r"Plain \(at optional\) has no field 'rate', nor any other")],
)  # fmt: skip
def test_what_has_no_fields_can_be_replaced_in_the_file_alone(path, fault):
    tree = replace(Outer(), optional=Plain())
    with pytest.raises(UserError, match=f"{fault}; put another value in its place in the experiment's file"):
        override(tree, {path: "1"})


def test_a_tree_survives_the_exchange_with_a_config_dict():
    tree = Outer(inner=Inner(size=3), shape=(1, 2, 3), optional=Inner(rate=0.1))
    assert from_config_dict(tree, to_config_dict(tree)) == tree
    model = every(blocks(4), 2, lambda ffn: MoE(expert=ffn, num_experts=4))
    assert from_config_dict(model, to_config_dict(model)) == model
    # through text too: what a checkpoint stores
    assert from_config_dict(tree, ConfigDict(json.loads(to_json(tree)))) == tree


def test_functions_are_told_by_name_in_text_and_survive_the_exchange():
    tree = Functions(many=(len, Inner.__init__, partial(max, 1)), one=partial(partial(sorted, key=abs), reverse=True))
    assert from_config_dict(tree, to_config_dict(tree)) == tree
    told = json.loads(to_json(tree))
    assert told["many"] == ["builtins.len", f"{__name__}.Inner.__init__", "builtins.max"]
    assert told["one"] == "builtins.sorted"
    assert describe(tree) == f"many: {tuple(told['many'])!r}\none: 'builtins.sorted'"


def test_edits_of_the_config_dict_reach_the_tree():
    cfg = to_config_dict(Outer())
    cfg.inner.rate, cfg.rules["0"].match, cfg.shape, cfg.inner.size = 0.25, "w", (7, 8), 9
    changed = from_config_dict(Outer(), cfg)
    assert changed == Outer(inner=Inner(rate=0.25, size=9), shape=(7, 8), rules=(Rule(match="w"), Rule(match="y")))


def test_the_config_dict_is_locked():
    cfg = to_config_dict(Outer())
    with pytest.raises(AttributeError, match="stepz"):
        cfg.stepz = 1
    with pytest.raises(KeyError):
        cfg.inner["raet"] = 1.0
    with pytest.raises(TypeError):
        cfg.steps = "many"


def test_a_config_dict_of_another_tree_is_refused():
    cfg = to_config_dict(Outer())
    with cfg.ignore_type():
        cfg.inner.size = "large"  # None had no type to compare with
    with pytest.raises(UserError, match=r"inner\.size='large' has the wrong type; it takes int or none"):
        from_config_dict(Outer(), cfg)
    with pytest.raises(UserError, match="config is a Inner, but this experiment has Outer there"):
        from_config_dict(Outer(), to_config_dict(Inner()))
    with to_config_dict(Outer()).unlocked() as more:
        more.extra = 1
    with pytest.raises(UserError, match="Outer has no field 'extra'"):
        from_config_dict(Outer(), more)
    with to_config_dict(Outer()).unlocked() as less:
        del less.steps
    with pytest.raises(UserError, match="config lacks the field 'steps' of Outer"):
        from_config_dict(Outer(), less)


def test_swap_changes_every_part_of_a_class_or_those_under_a_path():
    tree = Sequence((blocks(2), blocks(3)))
    wide = lambda ffn: replace(ffn, hidden=16)
    widths = lambda tree: [part.hidden for _, part in walk(tree) if isinstance(part, FeedForward)]
    assert widths(swap(tree, FeedForward, wide)) == [16, 16]
    assert widths(swap(tree, FeedForward, wide, where="layers/1/**")) == [8, 16]
    assert widths(tree) == [8, 8]  # trees are values
    assert swap(tree, Sequence, lambda _: blocks(1)) == blocks(1)  # the root too


def test_swap_does_not_search_what_it_put_in():
    swapped = swap(blocks(2), FeedForward, lambda ffn: MoE(expert=ffn, num_experts=4))
    assert isinstance(swapped.layer.ffn, MoE)
    assert isinstance(swapped.layer.ffn.expert, FeedForward)


def test_a_swap_that_never_applies_is_an_error():
    with pytest.raises(UserError, match="swap found no MoE"):
        swap(blocks(2), MoE, lambda moe: moe)
    with pytest.raises(UserError, match=r"swap found no FeedForward at 'embed/\*\*'"):
        swap(blocks(2), FeedForward, lambda ffn: ffn, where="embed/**")


def test_every_kth_block_changes_and_the_others_stay():
    to_moe = lambda ffn: MoE(expert=ffn, num_experts=4)
    plain = blocks(6)
    changed = every(plain, 3, to_moe)
    assert changed.times == 2
    assert [type(layer.ffn) for layer in changed.layer.layers] == [FeedForward, FeedForward, MoE]
    assert changed.layer.layers[0] == plain.layer
    assert every(plain, 1, to_moe).times == 6
    assert isinstance(every(plain, 1, to_moe).layer.ffn, MoE)
    assert every(Sequence((plain,)), 2, to_moe).layers[0].times == 3  # anywhere in a tree


@pytest.mark.parametrize("k", [4, 7, 0, -2])
def test_every_refuses_what_does_not_divide_the_stack(k):
    with pytest.raises(UserError, match="choose a divisor of 6"):
        every(blocks(6), k, lambda ffn: ffn)


def test_every_needs_a_repeat():
    with pytest.raises(UserError, match="swap found no Repeat"):
        every(Block(attention=Attention(num_heads=2), ffn=FeedForward(hidden=8)), 2, lambda ffn: ffn)


def test_describe_names_every_value():
    text = describe(Outer())
    assert "inner: Inner\n  rate: 0.5\n  size: None\n  act: 'silu'" in text
    assert "rules: tuple of 2\n  0: Rule\n    match: 'x'\n    value: 1.0\n  1: Rule" in text
    assert len(text.splitlines()) == 17
    for part in (RoPE(base=7.0), LayerNorm(eps=0.125), RouterLosses(z=0.5)):
        assert all(str(value) in describe(part) for value in vars(part).values())


def test_descriptions_differ_wherever_trees_do():
    base = blocks(2)
    for path in ("times", "layer.ffn.hidden", "layer.norm.eps", "layer.attention.rope.base"):
        assert describe(override(base, {path: "9"})) != describe(base)
    assert describe(swap(base, RMSNorm, lambda norm: LayerNorm(eps=norm.eps))) != describe(base)


def test_differences_list_each_change_once():
    old, new = (to_config_dict(tree).to_dict() for tree in (Outer(), Outer(inner=Inner(rate=0.1), steps=20)))
    assert differences(old, new) == ["inner.rate: 0.5 -> 0.1", "steps: 10 -> 20"]
    assert differences(old, old) == []
