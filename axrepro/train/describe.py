"""What an experiment is and needs, without making an array."""

import math

import jax
from jax.sharding import PartitionSpec

from axrepro.core.config import describe as describe_tree
from axrepro.core.param import count_params
from axrepro.core.sharding import shard_bytes
from axrepro.core.tree import flatten
from axrepro.data import logical_axes
from axrepro.train.experiment import Experiment, MeshRule
from axrepro.train.state import Program, state_layout


def bytes_per_device(experiment: Experiment, num_devices: int) -> dict[str, int]:
    """Bytes that one device holds between steps, by kind; activations come on top and depend on the compiler.

    Raises:
      UserError: if the mesh does not fit this many devices or the parameters.
    """
    sizes = experiment.mesh.sizes(num_devices)
    program = Program(experiment, mesh=None, platform="cpu")
    layout = state_layout(program, sizes)
    state = jax.eval_shape(program.init, 0)

    def total(tree, specs) -> int:
        leaves = jax.tree.leaves(tree)
        specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        return sum(shard_bytes(x.shape, x.dtype.itemsize, spec, sizes) for x, spec in zip(leaves, specs, strict=True))

    params, specs = flatten(state.params), flatten(layout.params)
    gradients = {path: x for path, x in params.items() if path in program.trained_paths}
    data = experiment.data.abstract()
    averaged = {"averaged parameters": total(state.average, layout.average)} if state.average else {}
    return {
        "parameters": total(state.params, layout.params),
        "optimizer state": total(state.opt_state, layout.opt_state),
        **averaged,
        "gradients": total(gradients, {path: specs[path] for path in gradients}),
        "batch": sum(
            shard_bytes(x.shape, x.dtype.itemsize, experiment.rules.spec(logical_axes(x), x.shape, sizes), sizes)
            for x in data.values()
        ),
    }


def describe(name: str, experiment: Experiment, slice_name: str, num_devices: int, rule: MeshRule | None) -> str:
    """The config tree, and the figures that follow from it, as text."""
    data = {key: x.shape for key, x in experiment.data.abstract().items()}
    experiment.method.check(data, None)  # the size of the vocabulary may be in a file that is not here
    specs, flops = experiment.method.specs(), experiment.method.flops(data)
    sizes = experiment.mesh.sizes(num_devices)
    per_device = bytes_per_device(experiment, num_devices)
    tokens = math.prod(data["tokens"]) if "tokens" in data else experiment.data.batch_size
    lines = [
        f"{name}: Experiment",
        describe_tree(experiment, "  "),
        "",
        f"parameters      {count_params(specs):,} total, {count_params(specs, active=True):,} active per token",
        f"per step        {tokens:,} {'tokens' if 'tokens' in data else 'examples'}, "
        f"{flops.causal / 1e12:,.4g} TFLOP (attention as masked), {flops.full / 1e12:,.4g} (whole attention matrix)",
        f"hardware        {slice_name}: {num_devices} devices, "
        + (f"mesh rule {rule.match!r}" if rule else "no mesh rule for it, the experiment's own settings"),
        "mesh            " + ", ".join(f"{axis} {size}" for axis, size in sizes.items()),
        "bytes per device "
        + ", ".join(f"{kind} {_bytes(size)}" for kind, size in per_device.items())
        + f"; {_bytes(sum(per_device.values()))} in all, activations not included",
    ]
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
