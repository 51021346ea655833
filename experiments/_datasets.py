"""Data of other kinds than plain text, for `python -m axrepro.data --data=experiments._datasets:NAME` and for tests."""

import zlib
from typing import Any

from axrepro.data import (
    AudioFiles,
    BestFit,
    CropOrPadAudio,
    DecodeAudio,
    Feature,
    FromFunction,
    JsonLines,
    LogMel,
    NormaliseImage,
    Pipeline,
    RandomCrop,
    Resize,
    Template,
    Text,
)


def _sklearn_digits(split: str) -> list[dict]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pairs = enumerate(zip(digits.images, digits.target, strict=True))
    held_out = lambda i: zlib.crc32(str(i).encode()) % 5 == 0
    return [
        {"image": (image * 15.9).astype("uint8")[:, :, None], "label": int(label)}
        for i, (image, label) in pairs
        if held_out(i) == (split == "eval")
    ]


def digits() -> Pipeline:
    """1,797 handwritten digits of 8 x 8 pixels, which scikit-learn brings along."""
    return Pipeline(
        batch_size=32,
        source=FromFunction(_sklearn_digits),
        transforms=(Resize(size=32), RandomCrop(size=28), NormaliseImage(mean=(0.5,), std=(0.5,))),
        features=(Feature(name="image", shape=(28, 28, 1)), Feature(name="label", dtype="int32")),
    )


def spoken_digits() -> Pipeline:
    """3,000 recordings of spoken digits at 8 kHz, in an archive: data/spoken_digits/recordings.tar.xz."""
    return Pipeline(
        batch_size=32,
        source=AudioFiles(
            "data/spoken_digits/recordings.tar.xz", name_fields=r"(?P<label>\d)_(?P<speaker>\w+)_\d+\.wav"
        ),
        transforms=(
            DecodeAudio(rate=8000),
            CropOrPadAudio(length=8000),
            LogMel(rate=8000, num_mels=40, window_size=200, hop=80),
        ),
        features=(Feature(name="audio", shape=(101, 40)), Feature(name="label", dtype="int32")),
    )


def gsm8k() -> Text:
    """Word problems with worked answers, of which only the answers count: data/gsm8k/*.jsonl."""
    return Text(
        batch_size=8,
        sequence_length=512,
        source=JsonLines("data/gsm8k/train.jsonl", eval_pattern="data/gsm8k/test.jsonl"),
        transforms=(Template(template="Question: {question}\nAnswer: {answer}", loss=("answer",)),),
        packing=BestFit(),
        loss_mask=True,
    )
