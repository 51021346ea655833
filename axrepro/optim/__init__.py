"""Optimizers, learning-rate schedules and averages: plain data in the config, optax transformations once the run is
known."""

from axrepro.optim.adafactor import Adafactor
from axrepro.optim.adamw import AdamW
from axrepro.optim.average import Average, Ema, Uniform
from axrepro.optim.lion import Lion
from axrepro.optim.muon import Muon
from axrepro.optim.optimizer import Optimizer, mup_simple
from axrepro.optim.per_path import PerPath
from axrepro.optim.schedule import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay
from axrepro.optim.sgd import LARS, SGD
from axrepro.optim.state import state_partitions

__all__ = [
    "LARS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Average",
    "Constant",
    "Cosine",
    "Ema",
    "InverseSqrt",
    "Linear",
    "Lion",
    "Muon",
    "Optimizer",
    "PerPath",
    "Schedule",
    "Uniform",
    "WarmupStableDecay",
    "mup_simple",
    "state_partitions",
]
