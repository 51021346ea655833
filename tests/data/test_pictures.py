"""Sheets that are drawn of examples: what is shown is what the examples hold."""

import io

import numpy as np
import pytest
from PIL import Image

from axrepro.core import UserError
from axrepro.data.tools.pictures import audio_sheet, image_sheet
from axrepro.data.transforms.audio import LogMel
from axrepro.data.transforms.images import NormaliseImage

COLOURS = np.array([[200, 30, 30], [30, 160, 60], [20, 40, 220]], np.uint8)
MEL = LogMel(rate=8000, num_mels=20, window_size=200, hop=80)


def tile(colour) -> np.ndarray:
    return np.tile(colour, (6, 5, 1))


def png(image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def drawn(path, colour) -> np.ndarray:
    """Where in the sheet a colour is: (row, column) of each pixel."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.argwhere((abs(sheet - colour) <= 1).all(-1))


@pytest.mark.parametrize("kind", ["bytes", "pixels", "normalised"])
def test_a_sheet_shows_the_pictures_in_order_and_in_their_colours(tmp_path, kind):
    normalise = NormaliseImage()
    make = {
        "bytes": png,
        "pixels": lambda image: image,
        "normalised": lambda image: normalise.apply(image, np.random.default_rng()),
    }[kind]
    examples = [{"image": make(tile(colour)), "label": i} for i, colour in enumerate(COLOURS)]
    image_sheet(examples, tmp_path / "sheet.png", columns=2, normalised=normalise, classes=("a", "b", "c"))
    places = [drawn(tmp_path / "sheet.png", colour) for colour in COLOURS]
    assert min(map(len, places)) > 5000
    first, second, third = (place.mean(0) for place in places)
    assert first[0] == pytest.approx(second[0], abs=2)
    assert first[1] == pytest.approx(third[1], abs=2)
    assert first[1] < second[1]
    assert first[0] < third[0]


def test_pictures_of_unknown_range_are_stretched_and_any_title_is_drawn(tmp_path):
    ramp = np.linspace(-7, 9, 300, dtype=np.float32).reshape(10, 30, 1)
    examples = [
        {"image": ramp, "text": "costs $5 and $6, " * 20},
        {"image": ramp, "label": np.float32([0.7, 0, 0.3])},
        {"image": np.zeros((4, 4, 1), np.float32), "name": "a/b.png"},
    ]
    image_sheet(examples, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert (sheet.min(), sheet.max()) == (0, 255)
    assert len(np.unique(sheet)) > 100


def test_a_sheet_of_sounds_shows_waves_and_features(tmp_path):
    samples = np.sin(np.arange(4000) / 3).astype(np.float32)
    features = MEL.apply(samples, np.random.default_rng())
    audio_sheet([{"audio": samples, "label": 1}] * 2, tmp_path / "sounds.png", mel=MEL)
    audio_sheet([{"audio": features, "label": 1}] * 2, tmp_path / "features.png", mel=MEL)
    blue = (0x1F, 0x77, 0xB4)  # of the first line in a plot
    assert len(drawn(tmp_path / "sounds.png", blue)) > 500
    assert len(drawn(tmp_path / "features.png", blue)) == 0


def test_an_empty_sheet_is_refused(tmp_path):
    for draw in (lambda path: image_sheet([], path), lambda path: audio_sheet([], path, mel=MEL)):
        with pytest.raises(UserError, match=r"no examples to draw in .*sheet\.png"):
            draw(tmp_path / "sheet.png")
