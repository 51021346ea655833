"""The named shapes of moe_dense have the parameters and tokens that their names promise."""

import re

import pytest

from axrepro import registry
from axrepro.core.param import count_params

VOCABULARY, CHOICES = 32768, 2
DENSE = {"6.4": (32, 4096), "12.6": (40, 5120), "29.6": (48, 7168), "1.6": (32, 2048)}  # billions: (L, D)
NAMED = {  # backbone, experts in every 4th block, or as EVERY says
    "dense_6b": ("6.4", 0),
    "dense_13b": ("12.6", 0),
    "dense_29b": ("29.6", 0),
    "moe_6b": ("6.4", 64),
    "moe_6b_every1": ("6.4", 64),
    "moe_6b_every2": ("6.4", 64),
    "moe_13b": ("12.6", 64),
    "moe_29b": ("29.6", 64),
    "moe_1p6b_256e": ("1.6", 256),
}
EVERY = {"moe_6b_every1": 1, "moe_6b_every2": 2}
ENTRIES = registry.index()


@pytest.mark.parametrize("name", NAMED)
def test_parameters_and_tokens_are_those_of_the_name(name):
    billions, experts = NAMED[name]
    layers, dim = DENSE[billions]
    hidden = 128 * round(8 * dim / 3 / 128)
    ffn = 3 * dim * hidden
    dense = layers * (4 * dim**2 + ffn + 2 * dim) + dim
    assert dense / 1e9 == pytest.approx(float(billions), abs=0.05)
    assert dense == pytest.approx(12 * layers * dim**2, rel=16 / dim)  # 64 hidden units, by rounding

    sparse = layers // EVERY.get(name, 4) if experts else 0
    router = dim * experts
    experiment = registry.load(registry.find(name, ENTRIES))
    specs = experiment.method.model.specs()
    total = VOCABULARY * dim + dense + sparse * (router + (experts - 1) * ffn)
    assert count_params(specs) == total
    assert count_params(specs, active=True) == VOCABULARY * dim + dense + sparse * (router + (CHOICES - 1) * ffn)
    tokens = experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length
    assert tokens == pytest.approx(20e9 * float(billions), rel=1e-4)


def test_every_large_shape_is_counted():
    small = re.compile("tiny|[0-9]k")  # those in thousands are counted in tests/study/test_protocol.py
    large = {e.function for e in ENTRIES if e.file == "moe_dense" and not small.search(e.function)}
    assert large == set(NAMED)
