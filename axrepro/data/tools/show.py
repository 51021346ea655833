"""What a batch holds, for a person to look at: decoded text with its boundaries and masks, pictures, sound, speed."""

import math
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from axrepro.data.base import Batches, Data
from axrepro.data.mixture import Mixture
from axrepro.data.transforms.image_augmentation import MultiCrop
from axrepro.data.vocabulary import Vocabulary
from axrepro.errors import UserError

_WIDTH = 116
_MOST = 600  # characters of a segment that are printed


def show(data: Data, batches: Batches, number: int, folder: Path) -> Iterator[str]:
    """Lines about the first examples, and a PNG for each field that can be seen or heard.

    Args:
      number: of examples.   folder: where pictures are written.
    """
    stats = batches.stats()
    yield f"{data.describe()}: " + (", ".join(f"{count:,} {name}" for name, count in stats.items()) or "sizes unknown")
    if stats.get("tokens") and stats.get("bytes"):
        yield f"{stats['bytes'] / stats['tokens']:.3f} bytes per token"
    rows: list[dict[str, np.ndarray]] = []
    for batch in batches:
        arrays = {name: np.asarray(array) for name, array in batch.items()}
        number_of_rows = len(next(iter(arrays.values())))
        rows += [{name: np.asarray(array[i]) for name, array in arrays.items()} for i in range(number_of_rows)]
        if len(rows) >= number:
            break
    vocabulary = vocabulary_of(data)
    for place, row in enumerate(rows[:number]):
        yield ""
        yield f"example {place}"
        yield from describe_row(row, vocabulary)
    try:
        yield from _pictures(data, rows[:number], folder)
    except OSError as error:
        raise UserError(f"cannot write pictures to {folder}: {error.strerror}; give another --pictures=DIR") from None


def vocabulary_of(data: Data) -> Vocabulary | None:
    """That of the data, or of the first part of a mixture."""
    if isinstance(data, Mixture):
        return vocabulary_of(next(iter(data.leaves().values())))
    return getattr(data, "vocabulary", None)


def describe_row(row: Mapping[str, np.ndarray], vocabulary: Vocabulary | None) -> Iterator[str]:
    """Lines about one row of a batch: its text segment by segment, or shape and range of each array."""
    if vocabulary is None or "tokens" not in row or "targets" not in row:
        yield from _others(row, vocabulary)
        return
    segments = np.asarray(row.get("segment_ids", np.ones(len(row["tokens"]), np.int32)))
    weights = row.get("loss_mask")
    places, filled = len(segments), int((segments > 0).sum())
    told = f"  {places} places, {len(set(segments[segments > 0].tolist()))} segments, {places - filled} of padding"
    yield told + ("" if weights is None else f", {int(np.count_nonzero(weights))} targets in the loss")
    for segment in sorted(set(segments[segments > 0].tolist())):
        here = np.flatnonzero(segments == segment)
        yield f"  segment {segment}: places {here[0]} to {here[-1]}"
        yield from _wrapped(
            _masked(row["targets"][here], None if weights is None else weights[here], vocabulary), "    "
        )
    told_already = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    yield from _others({name: value for name, value in row.items() if name not in told_already}, vocabulary)


def _others(row: Mapping[str, np.ndarray], vocabulary: Vocabulary | None) -> Iterator[str]:
    for name, value in row.items():
        yield f"  {name:<16} {_summary(value)}"
        if vocabulary is not None and name.endswith(("inputs", "tokens")):
            yield from _wrapped(_decoded(value, vocabulary), "    ")


def _masked(targets: np.ndarray, weights: np.ndarray | None, vocabulary: Vocabulary) -> str:
    """The text of targets, with ⟦⟧ round what does not count in the loss, and ¶ where a document ends."""
    if weights is None:
        weights = np.ones(len(targets))
    cuts = np.flatnonzero(np.diff(weights != 0)) + 1
    parts = []
    for run, counts in zip(np.split(targets, cuts), np.split(weights != 0, cuts), strict=True):
        text = _decoded(run, vocabulary) + ("¶" if run[-1] == vocabulary.eos_id else "")
        parts.append(text if counts[0] else f"⟦{text}⟧")
    return "".join(parts)


def _decoded(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of ids, with sentinels and other special ones as ⟨id⟩, which `decode` leaves out."""
    plain = (vocabulary.pad_id, vocabulary.eos_id)
    special = {i for i in set(ids.tolist()) if i not in plain and not vocabulary.decode([i])}
    parts, start = [], 0
    for place, i in enumerate(ids.tolist()):
        if i in special:
            parts += [vocabulary.decode(ids[start:place]), f"⟨{i}⟩"]
            start = place + 1
    return "".join([*parts, vocabulary.decode(ids[start:])])


def _wrapped(text: str, indent: str) -> Iterator[str]:
    cut = text if len(text) <= _MOST else f"{text[: _MOST // 2]} … {text[-_MOST // 2 :]}"
    for line in cut.splitlines() or [""]:
        yield from textwrap.wrap(
            line, _WIDTH, initial_indent=indent, subsequent_indent=indent, drop_whitespace=False
        ) or [indent]


def _summary(value: np.ndarray) -> str:
    kind = f"{value.dtype.name}{list(value.shape)}"
    if value.size == 0 or value.ndim == 0:
        return f"{kind} {value if value.ndim == 0 else ''}".rstrip()
    if value.dtype == bool:
        return f"{kind} {int(value.sum())} of {value.size} true"
    return f"{kind} {value.min():.4g} to {value.max():.4g}, mean {value.mean(dtype=np.float64):.4g}"


def _each(transforms: Iterable) -> Iterator[Any]:
    """All transforms, those of views of a `MultiCrop` included."""
    for transform in transforms:
        if isinstance(transform, tuple):
            yield from _each(transform)
        elif isinstance(transform, MultiCrop):
            yield from _each((*transform.global_views, *transform.local_views))
        else:
            yield transform


def _pictures(data: Data, rows: list[dict[str, np.ndarray]], folder: Path) -> Iterator[str]:
    from axrepro.data.tools.pictures import audio_sheet, image_sheet
    from axrepro.data.transforms.audio import DecodeAudio, LogMel
    from axrepro.data.transforms.images import NormaliseImage

    def find(kind) -> Any:
        return next((t for t in _each(getattr(data, "transforms", ())) if isinstance(t, kind)), None)

    for name, value in rows[0].items() if rows else ():
        path = folder / f"{name}.png"
        if value.ndim in (3, 4) and value.shape[-1] in (1, 3, 4):
            examples = [dict(row) for row in rows]
            if value.ndim == 4:  # several crops of one picture
                examples = [{**row, name: crop} for row in rows for crop in row[name]]
            folder.mkdir(parents=True, exist_ok=True)
            image_sheet(examples, path, field=name, normalised=find(NormaliseImage))
        elif value.dtype == np.float32 and (value.ndim == 2 or (value.ndim == 1 and len(value) > 64)):
            if "tokens" in rows[0]:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            rate = getattr(find(DecodeAudio), "rate", 16000)
            audio_sheet(rows, path, mel=find(LogMel) or LogMel(rate=rate), field=name)
        else:
            continue
        yield f"{name}: {path}"


def throughput(batches: Batches, seconds: float) -> Iterator[str]:
    """Lines about how fast batches come, and how full they are, over so many seconds."""
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds={seconds:g} must be a number above 0")
    next(batches)  # what happens once, happens here
    start, rows, places, filled, size = time.perf_counter(), 0, 0, 0, 0
    number = 0
    for batch in batches:
        number += 1
        first = next(iter(batch.values()))
        rows += first.shape[0]
        size += sum(array.nbytes for array in batch.values())
        if "segment_ids" in batch:
            segments = np.asarray(batch["segment_ids"])
            places, filled = places + segments.size, filled + int((segments > 0).sum())
        if time.perf_counter() - start > seconds:
            break
    if not number:
        yield "there is one batch only, so no speed to measure"
        return
    took = time.perf_counter() - start
    told = f"{number / took:,.1f} batches/s, {rows / took:,.0f} examples/s, {size / took / 1e6:,.1f} MB/s"
    yield told + (f", {filled / took:,.0f} tokens/s" if places else "")
    if places:
        yield f"{filled / places:.2%} of all places hold tokens"
    if counts := batches.counts():
        yield "taken: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())
