"""Sheets of examples, saved for a person to look at."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from axrepro.data.records import Example
from axrepro.data.transforms.audio import DecodeAudio, LogMel
from axrepro.data.transforms.fields import take
from axrepro.data.transforms.images import DecodeImage, NormaliseImage
from axrepro.errors import UserError


def image_sheet(
    examples: Iterable[Example],
    path: str | Path,
    *,
    field: str = "image",
    classes: Sequence[str] = (),
    normalised: NormaliseImage | None = None,
    columns: int = 8,
) -> None:
    """A PNG file with a grid of pictures, titled with their label, their text, or their name.

    Args:
      examples: each with a picture in `field`: the bytes of a file, uint8[H, W, C], or float[H, W, C].
      classes: what the labels are called.
      normalised: what made pictures of floats, to be undone; None: each is stretched from its least to its largest
        value.
    Raises:
      UserError: if there are no examples.
      ValueError: if a picture cannot be decoded.
    """
    tiles = [(_upright(take(example, field), normalised), _title(example, classes)) for example in examples]
    if not tiles:
        raise UserError(f"there are no examples to draw in {path}")
    columns = min(columns, len(tiles))
    lines = max(title.count("\n") + 1 for _, title in tiles)
    figure, grid = _grid(-(-len(tiles) // columns), columns, (1.5, 1.5 + 0.14 * lines))
    for axes in grid.flat:
        axes.axis("off")
    for axes, (picture, title) in zip(grid.flat, tiles, strict=False):
        # the pixels of a small picture are to be seen, and those of a large one not to be left out
        blurred = "nearest" if max(picture.shape[:2]) < 150 else "antialiased"
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation=blurred)
        axes.set_title(title, fontsize=7, pad=3, parse_math=False)
    figure.savefig(path, dpi=120)


def audio_sheet(
    examples: Iterable[Example],
    path: str | Path,
    *,
    mel: LogMel,
    field: str = "audio",
    classes: Sequence[str] = (),
    columns: int = 4,
) -> None:
    """A PNG file with the waveform and the log-mel features of each sound, titled as `image_sheet` does.

    Args:
      examples: each with a sound in `field`: the bytes of a file, float[N] samples, or float[T, M] features, which are
        drawn as they are, without a waveform.
      mel: makes the features, and says how many samples and frames there are in a second.
    Raises:
      UserError: if there are no examples.
      ValueError: if a sound cannot be decoded.
    """
    decode, rng = DecodeAudio(rate=mel.rate), np.random.default_rng(0)
    tiles = []
    for example in examples:
        value = take(example, field)
        samples = decode.apply(value, rng) if isinstance(value, bytes) else value
        features = samples if samples.ndim == 2 else mel.apply(samples, rng)
        tiles.append((samples if samples.ndim == 1 else None, features, _title(example, classes)))
    if not tiles:
        raise UserError(f"there are no examples to draw in {path}")
    columns, waves = min(columns, len(tiles)), any(samples is not None for samples, _, _ in tiles)
    rows, heights = -(-len(tiles) // columns), [1, 2] if waves else [2]
    figure, grid = _grid(len(heights) * rows, columns, (2.8, 2.6 / len(heights)), height_ratios=heights * rows)
    for axes in grid.flat:
        axes.axis("off")
    for number, (samples, features, title) in enumerate(tiles):
        row, column = divmod(number, columns)
        panels = grid[len(heights) * row : len(heights) * (row + 1), column]
        above, below = panels[0], panels[-1]
        seconds = len(features) * mel.hop / mel.rate
        for axes in panels:
            axes.tick_params(labelsize=6, length=2, pad=1)
        if samples is not None:
            above.axis("on")
            above.plot(np.arange(len(samples)) / mel.rate, samples, linewidth=0.4)
            above.tick_params(labelbottom=False)
            above.set_xlim(0, seconds)
        below.axis("on")
        below.imshow(features.T, origin="lower", aspect="auto", extent=(0, seconds, 0, features.shape[1]), cmap="magma")
        above.set_title(title, fontsize=7, pad=3, parse_math=False)
        if column == 0:
            above.set_ylabel("sample", fontsize=6)
            below.set_ylabel("mel filter", fontsize=6)
        if row == rows - 1:
            below.set_xlabel("seconds", fontsize=6)
    figure.savefig(path, dpi=120)


def _grid(rows: int, columns: int, inches: tuple[float, float], **how):
    """A figure and its axes [rows, columns]; without pyplot, which would keep it, and choose a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=how)


def _upright(value: Any, normalised: NormaliseImage | None) -> np.ndarray:
    """float[H, W, C] in [0, 1]."""
    if isinstance(value, bytes):
        value = DecodeImage().apply(value, np.random.default_rng(0))
    if value.dtype == np.uint8:
        return value / 255
    if normalised is not None:
        return normalised.invert(value)
    low, high = value.min(), value.max()
    return (value - low) / max(high - low, 1e-12)


def _title(example: Example, classes: Sequence[str]) -> str:
    label = example.get("label")
    if isinstance(label, np.ndarray) and label.ndim == 1:  # mixed or smoothed: the two largest
        top = [int(place) for place in np.argsort(-label)[:2] if label[place] > 0.01]
        title = ", ".join(f"{_called(place, classes)} {label[place]:.2f}" for place in top)
    elif label is not None:
        title = _called(label, classes)
    elif isinstance(example.get("text"), str):
        title = example["text"]
    else:
        title = str(example.get("name", "")).rsplit("/", 1)[-1]
    return "\n".join(textwrap.wrap(title, 26, max_lines=3, placeholder=" …"))


def _called(label, classes: Sequence[str]) -> str:
    return classes[label] if classes else str(label)
