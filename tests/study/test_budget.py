"""Budgets: arithmetic by hand, and the invariants that make a comparison one at equal cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axrepro.errors import UserError
from axrepro.study.budget import BESIDE, Cost, arm_steps, between, dense_steps

DENSE = Cost(tokens=2048, flops=1e9, seconds=0.1)
SPARSE = Cost(tokens=2048, flops=1.25e9, seconds=0.125)


def test_the_dense_model_gets_twenty_tokens_a_parameter():
    assert dense_steps(DENSE, parameters=1_024_000, tokens_per_parameter=20) == 10_000
    assert dense_steps(DENSE, parameters=1_024_000, tokens_per_parameter=5) == 2_500


def test_hours_take_the_place_of_tokens():
    assert dense_steps(DENSE, parameters=1_024_000, tokens_per_parameter=20, hours=2) == 72_000


def test_a_sparse_model_gets_what_its_step_leaves_of_the_budget():
    assert arm_steps("wall_clock", SPARSE, DENSE, 10_000) == 8_000
    assert arm_steps("tokens", SPARSE, DENSE, 10_000) == 10_000
    assert arm_steps("flops", SPARSE, DENSE, 10_000) == 8_000
    assert arm_steps("tokens", Cost(tokens=4096, flops=1.0, seconds=1.0), DENSE, 10_000) == 5_000


COSTS = st.builds(
    Cost,
    tokens=st.integers(1, 10**7),
    flops=st.floats(1e3, 1e18),
    seconds=st.floats(1e-4, 100),
)


@given(COSTS, COSTS, st.integers(1000, 10**6), st.sampled_from(BESIDE))
def test_no_arm_differs_from_the_budget_by_more_than_half_a_step(arm, dense, steps, rule):
    spend = lambda cost: {"wall_clock": cost.seconds, "tokens": cost.tokens, "flops": cost.flops}[rule]
    if steps * spend(dense) < spend(arm):
        return
    spent = arm_steps(rule, arm, dense, steps) * spend(arm)
    assert spent == pytest.approx(steps * spend(dense), abs=0.5001 * spend(arm), rel=1e-12)


@given(COSTS, st.integers(1, 10**6), st.sampled_from(BESIDE))
def test_a_model_beside_itself_trains_as_long(cost, steps, rule):
    assert arm_steps(rule, cost, cost, steps) == steps


def test_at_equal_step_time_steps_are_those_of_a_dense_model_there():
    curve = [(0.4, 1600), (0.1, 100), (0.2, 400)]  # in any order: twice the seconds, four times the steps
    place = between(0.1 * math.sqrt(2), curve)
    assert (place.lower, place.upper, place.steps) == (1, 2, 200)
    assert (place.share, place.growth, place.width) == pytest.approx((0.5, 2, math.log(2)))
    assert between(0.1 * 2**1.75, curve).steps == round(400 * 4**0.75)
    for seconds, steps in curve:
        assert between(seconds, curve).steps == steps


def test_a_step_that_no_two_dense_models_enclose_has_no_place():
    curve = [(0.1, 100), (0.2, 400)]
    assert between(0.0999, curve) is None
    assert between(0.2001, curve) is None
    assert between(0.1, curve[:1]) is None
    assert between(0.1, []) is None


def test_a_budget_below_one_step_is_an_error_that_says_what_to_raise():
    with pytest.raises(UserError, match="raise tokens_per_parameter or hours"):
        dense_steps(DENSE, parameters=10, tokens_per_parameter=20)
    with pytest.raises(UserError, match="raise tokens_per_parameter or hours"):
        arm_steps("wall_clock", Cost(tokens=2048, flops=1.0, seconds=1e6), DENSE, 10)
