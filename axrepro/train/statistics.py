"""statistics.jsonl and statistics.png: activations, gradients and updates by layer, at the steps asked for."""

import os
from pathlib import Path

import numpy as np

from axrepro.train.inspection import Look
from axrepro.train.writers import MetricsFile, read_metrics


def as_record(looks: list[Look]) -> dict[str, dict[str, dict]]:
    """The looks as JSON values, a list where layers are stacked.

    "activations" by scope and tag: `rms`, `max_abs`, `zeros` (their share). "parameters" by path: `rms`,
    `gradient_rms`, `gradient_max_abs`, `update_ratio` (rms of the optimizer's change over rms of the parameter).
    """
    activations, parameters = {}, {}
    rms = lambda look: np.sqrt(look.seen["mean_square"])
    own = {look.name: look for look in looks if look.kind == "parameter"}
    for look in looks:
        if look.kind == "activation":
            numbers = {"rms": rms(look), "max_abs": look.seen["max_abs"], "zeros": look.seen["zeros"]}
            activations[_free(look.name, activations)] = numbers
        elif look.kind == "gradient":
            numbers = {"gradient_rms": rms(look), "gradient_max_abs": look.seen["max_abs"]}
            parameters.setdefault(look.name, {}).update(numbers)
        elif look.kind == "change":
            path = next(path for path in own if look.name == path or look.name.endswith(f"/{path}"))
            size = rms(own[path])
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(size > 0, rms(look) / size, np.where(rms(look) > 0, np.inf, 0.0))
            parameters.setdefault(look.name, {}).update({"rms": size, "update_ratio": ratio})
    plain = lambda group: {name: {k: np.asarray(v).tolist() for k, v in n.items()} for name, n in group.items()}
    return {"activations": plain(activations), "parameters": plain(parameters)}


def _free(name: str, taken: dict) -> str:
    """The name, numbered where one scope tags several values by it."""
    number = 2
    while (numbered := name if number == 2 and name not in taken else f"{name}#{number}") in taken:
        number += 1
    return numbered


class Statistics:
    """The file and the picture of a run, written by its first process."""

    def __init__(self, folder: Path, after_step: int):
        self._folder = folder
        self._file = MetricsFile(folder / "statistics.jsonl", after_step)

    def write(self, step: int, looks: list[Look]) -> None:
        """One object for the step."""
        self._file.write(step, as_record(looks))

    def close(self) -> None:
        """Ends the file and draws the picture."""
        self._file.close()
        draw(self._folder)


_PANELS = (
    ("activations", "rms", "activations: rms"),
    ("activations", "max_abs", "activations: largest magnitude"),
    ("parameters", "gradient_rms", "gradients: rms"),
    ("parameters", "update_ratio", "updates: rms over the parameter's"),
)


def draw(folder: Path) -> None:
    """`folder`/statistics.png: heat maps of layer by step, one row per name and layer, in logarithms of ten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(folder / "statistics.jsonl")
    if not lines:
        return
    names = {group: list(lines[-1][group]) for group in ("activations", "parameters")}
    rows = {g: sum(np.size(next(iter(lines[-1][g][n].values()))) for n in names[g]) for g in names}
    height = min(40.0, 1.5 + 0.16 * max(rows.values()))
    figure, grid = plt.subplots(1, len(_PANELS), figsize=(7 * len(_PANELS), max(4.0, height)), layout="constrained")
    for axes, (group, quantity, title) in zip(grid, _PANELS, strict=True):
        columns, ticks, labels = [], [], []
        for name in names[group]:
            found = [line[group].get(name, {}).get(quantity, "nan") for line in lines]
            block = np.stack(np.broadcast_arrays(*(np.ravel(np.asarray(value, float)) for value in found)), axis=1)
            size = len(block)
            ticks.append(sum(map(len, columns)) + (size - 1) / 2)
            labels.append(name if size == 1 else f"{name} ({size})")
            columns.append(block)
        values = np.concatenate(columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values)
        values = np.where(np.isfinite(values), values, np.nan)  # zero and not finite stay white
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        for boundary in np.cumsum([len(block) for block in columns])[:-1]:
            axes.axhline(boundary - 0.5, color="white", linewidth=0.5)
        shown = np.unique(np.linspace(0, len(lines) - 1, 6).round().astype(int))
        axes.set_xticks(shown, [lines[i]["step"] for i in shown])
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.set(xlabel="step", title=f"{title} (log10)")
        figure.colorbar(image, ax=axes, shrink=0.6)
    scratch = folder / "statistics.new.png"
    figure.savefig(scratch, dpi=90)
    plt.close(figure)
    os.replace(scratch, folder / "statistics.png")
