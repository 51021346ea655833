"""Optimizers and learning-rate schedules: plain data in the config, optax transformations once the run is known."""

from axrepro.optim.optimizer import SGD, Adafactor, AdamW, Optimizer, PerPath, mup_simple
from axrepro.optim.schedule import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay
from axrepro.optim.state import state_partitions

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Linear",
    "Optimizer",
    "PerPath",
    "Schedule",
    "WarmupStableDecay",
    "mup_simple",
    "state_partitions",
]
