"""The vocabulary of axrepro: parameters, context, aux values, layers and methods, sharding, configs."""

from axrepro.core.aux import Loss, Metric, Update, collect
from axrepro.core.config import describe, override, swap
from axrepro.core.context import Context
from axrepro.core.flops import Flops
from axrepro.core.interfaces import Layer, Method, Phase
from axrepro.core.param import Param
from axrepro.core.sharding import MeshShape, Rules, make_mesh
from axrepro.errors import UserError

__all__ = [
    "Context",
    "Flops",
    "Layer",
    "Loss",
    "MeshShape",
    "Method",
    "Metric",
    "Param",
    "Phase",
    "Rules",
    "Update",
    "UserError",
    "collect",
    "describe",
    "make_mesh",
    "override",
    "swap",
]
