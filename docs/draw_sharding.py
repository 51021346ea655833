"""Draws the pictures of sharding.md from the rules themselves: python docs/draw_sharding.py"""

from pathlib import Path

import jax
import matplotlib
from jax.sharding import NamedSharding
from matplotlib import pyplot as plt

from axrepro.core import MeshShape, Rules, make_mesh

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
matplotlib.use("Agg")

COLOURS = plt.get_cmap("tab10").colors
# title, logical axes, shape; the first two dimensions are drawn
TENSORS = (
    ("tokens", ("batch", "seq"), (8, 8)),
    ("feed-forward weight", ("embed", "mlp"), (8, 8)),
    ("weights of 4 experts", ("expert", "embed", "mlp"), (4, 8, 8)),
    ("groups before dispatch", ("group", None, "embed_act"), (8, 8, 8)),
    ("groups at the experts", ("group_dispatched", "expert", None, "embed_act"), (8, 4, 8, 8)),
)
MESHES = (
    ("data 2 × fsdp 4", {"data": 2, "fsdp": 4}),
    ("data 2 × fsdp 2 × expert 2", {"data": 2, "fsdp": 2, "expert": 2}),
    ("fsdp 4 × model 2", {"data": 1, "fsdp": 4, "model": 2}),
    ("fsdp 4 × seq 2", {"data": 1, "fsdp": 4, "seq": 2}),
)


def draw(axes, mesh, tensor) -> None:
    """One tensor on one mesh: each piece with the devices that hold it."""
    title, logical, shape = tensor
    spec = Rules().spec(logical, shape, dict(mesh.shape))
    height, width = shape[:2]
    pieces: dict[tuple, dict[tuple, list[int]]] = {}  # what is drawn -> what is not -> devices
    for device, index in NamedSharding(mesh, spec).devices_indices_map(shape).items():
        bounds = tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in zip(index, shape, strict=True))
        pieces.setdefault(bounds[:2], {}).setdefault(bounds[2:], []).append(device.id)
    for (rows, columns), holders in pieces.items():
        left, bottom = columns[0] / width, 1 - rows[1] / height
        size = (columns[1] - columns[0]) / width, (rows[1] - rows[0]) / height
        colour = (*COLOURS[min(map(min, holders.values())) % 10], 0.45)
        axes.add_patch(plt.Rectangle((left, bottom), *size, facecolor=colour, edgecolor="white", linewidth=2))
        text = " | ".join(" ".join(map(str, sorted(devices))) for devices in holders.values())
        axes.annotate(text, (left + size[0] / 2, bottom + size[1] / 2), ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(logical[0], fontsize=8)
    axes.set_xlabel(logical[1] or "token", fontsize=8)


def main() -> None:
    """Writes sharding.png beside this file."""
    figure, grid = plt.subplots(len(MESHES), len(TENSORS), figsize=(12, 10), layout="constrained")
    for row, (name, sizes) in zip(grid, MESHES, strict=True):
        mesh = make_mesh(MeshShape(**sizes))
        for axes, tensor in zip(row, TENSORS, strict=True):
            draw(axes, mesh, tensor)
        row[0].annotate(name, (-0.45, 0.5), xycoords="axes fraction", rotation=90, va="center", fontweight="bold")
    figure.suptitle("Which of eight devices hold which part. Several numbers: a copy on each; a bar: split further")
    figure.savefig(Path(__file__).with_name("sharding.png"), dpi=80)


if __name__ == "__main__":
    main()
