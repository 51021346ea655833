"""Schedules: values computed by hand at named steps, stretching with the run, refused inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axrepro.core import UserError, override
from axrepro.optim import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay

HALF_COSINE = 0.5 * (1 + np.cos(np.pi / 4))  # a quarter of the way down

# schedule, steps, {step: value}
BY_HAND = [
    (Constant(value=0.3), 10, {0: 0.3, 9: 0.3, 10: 0.3}),
    (Cosine(peak=2.0), 8, {0: 2.0, 2: 2 * HALF_COSINE, 4: 1.0, 8: 0.0, 9: 0.0}),
    (Cosine(peak=2.0, warmup=4, floor=0.1), 12, {0: 0.0, 1: 0.5, 4: 2.0, 8: 1.1, 12: 0.2, 20: 0.2}),
    (Cosine(peak=2.0, warmup=0.25, floor=0.1), 40, {0: 0.0, 5: 1.0, 10: 2.0, 25: 1.1, 40: 0.2}),
    (Linear(peak=2.0, warmup=4, floor=0.5), 12, {0: 0.0, 2: 1.0, 4: 2.0, 6: 1.75, 8: 1.5, 12: 1.0, 13: 1.0}),
    (Linear(peak=1.0), 4, {0: 1.0, 1: 0.75, 4: 0.0}),
    (
        WarmupStableDecay(peak=2.0, warmup=2, decay=0.4, floor=0.5),
        10,
        {0: 0.0, 1: 1.0, 2: 2.0, 6: 2.0, 8: 1.5, 10: 1.0},
    ),
    (WarmupStableDecay(peak=2.0, warmup=2, decay=0), 10, {1: 1.0, 2: 2.0, 10: 2.0}),
    (WarmupStableDecay(peak=1.0, warmup=0.5, decay=0.5), 7, {3: 1.0, 4: 1.0, 7: 0.0}),  # 3 + 3 of 7 steps
    (InverseSqrt(peak=3.0, warmup=4), 100, {0: 0.0, 2: 1.5, 4: 3.0, 16: 1.5, 36: 1.0}),
    (InverseSqrt(peak=3.0, warmup=0.04), 200, {4: 1.5, 8: 3.0, 32: 1.5}),
    (InverseSqrt(peak=1.0, warmup=0.01), 20, {0: 0.0, 1: 1.0, 4: 0.5}),  # at least one step
]


@pytest.mark.parametrize(("schedule", "steps", "values"), BY_HAND, ids=lambda x: getattr(type(x), "__name__", None))
def test_values_at_named_steps(schedule, steps, values):
    rate = schedule.build(steps)
    for step, value in values.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("schedule", [row[0] for row in BY_HAND], ids=repr)
def test_value_is_a_strong_float32_scalar_also_in_a_jit(schedule):
    for value in (schedule.build(200)(3), jax.jit(schedule.build(200))(jnp.int32(3))):
        assert value.dtype == jnp.float32
        assert value.shape == ()
        assert not value.weak_type


@pytest.mark.parametrize("schedule", [row[0] for row in BY_HAND], ids=repr)
def test_peak_is_the_largest_value(schedule):
    values = jax.jit(jax.vmap(schedule.build(200)))(jnp.arange(201))
    np.testing.assert_allclose(values.max(), schedule.peak, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(peak=1.0, warmup=0.1, floor=0.1),
        Linear(peak=1.0, warmup=0.1),
        WarmupStableDecay(peak=1.0, warmup=0.1, decay=0.2),
    ],
    ids=repr,
)
def test_a_longer_run_stretches_the_same_curve(schedule):
    short, long = schedule.build(100), schedule.build(300)
    for step in (0, 5, 10, 50, 90, 100):
        np.testing.assert_allclose(long(3 * step), short(step), rtol=1e-5, atol=1e-6)


def test_warmup_in_steps_does_not_stretch():
    for steps in (100, 1000):
        assert Cosine(peak=1.0, warmup=20).build(steps)(20) == 1.0
        assert Cosine(peak=1.0, warmup=20).build(steps)(10) == 0.5


def test_cosine_is_that_of_optax():
    ours = Cosine(peak=0.01, warmup=50, floor=0.005).build(1000)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.01, 50, 1000, end_value=0.005 * 0.01)
    steps = jnp.arange(0, 1100, 7)
    both = jax.jit(jax.vmap(lambda step: (ours(step), theirs(step))))(steps)
    np.testing.assert_allclose(*both, rtol=1e-6)


def test_warmup_is_overridden_as_steps_or_as_a_share():
    cosine = Cosine(peak=1.0, warmup=0.1)
    assert override(cosine, {"warmup": "30"}).build(100)(15) == 0.5
    assert override(Cosine(peak=1.0, warmup=30), {"warmup": "0.1"}).build(100)(5) == 0.5


@pytest.mark.parametrize("schedule", [Cosine, Linear, WarmupStableDecay, InverseSqrt])
def test_warmup_longer_than_the_run_names_field_and_remedy(schedule):
    with pytest.raises(UserError, match=rf"{schedule.__name__}\.warmup=500.*the run of 100.*train\.steps"):
        schedule(peak=1.0, warmup=500).build(100)


def test_warmup_as_long_as_the_run_is_allowed():
    assert Cosine(peak=1.0, warmup=10).build(10)(9) == pytest.approx(0.9)


def test_decay_that_overlaps_the_warmup_names_both_fields():
    with pytest.raises(UserError, match=r"WarmupStableDecay\.warmup=60 and decay=0\.5: 110 steps"):
        WarmupStableDecay(peak=1.0, warmup=60, decay=0.5).build(100)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Constant(value=-1.0), "Constant.value=-1.0"),
        (lambda: Constant(value=float("nan")), "Constant.value=nan"),
        (lambda: Cosine(peak=-1.0), "Cosine.peak=-1.0"),
        (lambda: Cosine(peak=1.0, warmup=-5), "Cosine.warmup=-5"),
        (lambda: Cosine(peak=1.0, warmup=2.5), "Cosine.warmup=2.5"),
        (lambda: Cosine(peak=1.0, floor=1.5), "Cosine.floor=1.5"),
        (lambda: Linear(peak=1.0, floor=-0.1), "Linear.floor=-0.1"),
        (lambda: Linear(peak="1e-3"), "Linear.peak='1e-3'"),
        (lambda: WarmupStableDecay(peak=1.0, decay=-1), "WarmupStableDecay.decay=-1"),
        (lambda: InverseSqrt(peak=1.0, warmup=0), "InverseSqrt.warmup=0"),
    ],
)
def test_refused_value_is_named_with_its_field(make, field, unchecked):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(f"{field}: it takes ")
