"""Step times are taken in turns, so that drift of the machine cancels."""

import statistics

import pytest

from axrepro.core.config import override
from axrepro.study.step_time import in_turns, measure
from experiments.moe_dense import dense_28k, moe_28k

SMALL = {
    "data.sequence_length": "32",
    "data.source.source.holdout": "1500",
    "method.model.dim": "16",
    "method.model.layers.times": "1",
}


def test_every_round_has_every_arm_once_and_begins_with_the_next():
    order = []
    in_turns({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=4)
    assert "".join(order) == "abcbcacababc"


def test_drift_of_the_machine_cancels_where_blocks_would_blame_one_arm():
    clock = {"turn": 0}

    def take(seconds):  # a machine that becomes 5 % slower with every turn
        clock["turn"] += 1
        return seconds * 1.05 ** clock["turn"]

    times = in_turns({"dense": lambda: take(1.0), "moe": lambda: take(1.2)}, rounds=12)
    ratios = [b / a for a, b in zip(times["dense"], times["moe"], strict=True)]
    assert statistics.fmean(ratios) == pytest.approx(1.2, rel=0.01)
    blocks = [take(1.0) for _ in range(12)], [take(1.2) for _ in range(12)]
    assert statistics.fmean(blocks[1]) / statistics.fmean(blocks[0]) > 1.8


def test_a_measurement_has_all_rounds_of_all_arms_that_fit_and_their_parts():
    told = []
    large = {"data.sequence_length": "262144", "data.batch_size": "8"}  # a terabyte of attention
    experiments = {
        "large": override(dense_28k(), SMALL | large),
        "dense": override(dense_28k(), SMALL),
        "moe": override(moe_28k(), SMALL),
    }
    found, failed = measure(experiments, rounds=3, steps=1, tell=told.append)
    assert set(found) == {"dense", "moe"}
    assert failed.keys() == {"large"}
    assert failed["large"].startswith("out of memory")
    assert told[1] == f"large is left out: {failed['large']}"
    for measured in found.values():
        assert len(measured.rounds) == 3
        assert min(measured.rounds) > 0
        assert sum(measured.parts.values()) == pytest.approx(statistics.median(measured.rounds))
        assert measured.memory > 0
    assert "experts" in found["moe"].parts
    assert "experts" not in found["dense"].parts
    assert told[-1] == "measuring step times: 3 rounds of 1 steps"
