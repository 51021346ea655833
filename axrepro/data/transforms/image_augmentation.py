"""What changes the look of pictures in training: RandAugment, and several different views of one picture."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from axrepro.data.records import Example, Transform
from axrepro.data.transforms.fields import FieldTransform, take
from axrepro.data.transforms.images import (
    FlipHorizontal,
    NormaliseImage,
    RandomResizedCrop,
    as_picture,
    as_pixels,
    require_probability,
)
from axrepro.errors import is_number, require, require_choice, require_not_negative


@dataclass(frozen=True, kw_only=True)
class RandAugment(FieldTransform):
    """`num_ops` operations in a row, each drawn evenly from 14, all of one magnitude.

    RandAugment (arXiv:1909.13719), Sec. 3 and Fig. 2: N and M. How a magnitude becomes an angle or a number of bits is
    in the authors' code alone (tensorflow/tpu, `autoaugment.py`), as here for severity "authors". There more bits are
    kept, and fewer pixels inverted, as M grows, and colours fade below M = 5. With "increasing", every operation does
    more the larger M is, as most later recipes have it (torchvision's, timm's "inc1"): posterize keeps 8 ... 4 bits,
    solarize inverts from 256 ... 0 on, and the four enhancements go either way, by 1 +- 0.9 M / 10.

    Departures from that code: the 14 operations are the paper's, and each is always applied; a translation is by up to
    150 / 331 of the side (AutoAugment's pixels, arXiv:1805.09501) and not 100 pixels whatever the side.

    Attributes:
      num_ops: N.
      magnitude: M, 0 to 30. At 10 the ranges end that AutoAugment draws from; angles and distances grow beyond.
      fill: value of the pixels that move in from outside.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    severity: Literal["authors", "increasing"] = "authors"
    fill: int = 128
    field: str = "image"

    def __post_init__(self):
        require_not_negative(self, "num_ops")
        require(self, "magnitude", is_number(self.magnitude) and 0 <= self.magnitude <= 30, "a number from 0 to 30")
        require(self, "fill", isinstance(self.fill, int) and 0 <= self.fill <= 255, "a whole number from 0 to 255")
        require_choice(self, "severity", Literal["authors", "increasing"])

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        picture = as_picture(value)
        for op, sign in zip(rng.integers(len(OPERATIONS), size=self.num_ops), rng.random(self.num_ops), strict=True):
            picture = self.operate(picture, OPERATIONS[op], 1 if sign < 0.5 else -1)
        return as_pixels(picture)

    def operate(self, picture, operation: str, sign: Literal[1, -1]):
        """One operation on a PIL image; `sign` is its direction, where it has one."""
        from PIL import Image, ImageEnhance, ImageOps

        level, increasing = self.magnitude / 10, self.severity == "increasing"
        match operation:
            case "identity":
                return picture
            case "autocontrast":
                return ImageOps.autocontrast(picture)
            case "equalize":
                return ImageOps.equalize(picture)
            case "solarize":
                threshold = int(256 * level)
                return ImageOps.solarize(picture, max(0, 256 - threshold) if increasing else threshold)
            case "posterize":
                bits = 8 - round(4 * level) if increasing else int(4 * level)
                return ImageOps.posterize(picture, min(8, max(0, bits)))
            case "color" | "contrast" | "brightness" | "sharpness":
                factor = max(0.0, 1 + sign * 0.9 * level) if increasing else 1.8 * level + 0.1
                return getattr(ImageEnhance, operation.capitalize())(picture).enhance(factor)
        fill = self.fill if picture.mode == "L" else (self.fill,) * 3
        if operation == "rotate":
            return picture.rotate(sign * 30 * level, fillcolor=fill)
        shear, shift = sign * 0.3 * level, sign * 150 / 331 * level
        matrix = {  # x and y of the source, each from (x, y, 1) of the result
            "shear_x": (1, shear, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, shear, 1, 0),
            "translate_x": (1, 0, shift * picture.width, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, shift * picture.height),
        }[operation]
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


@dataclass(frozen=True, kw_only=True)
class ColourJitter(FieldTransform):
    """Brightness, contrast, saturation and hue changed by random factors, in random order (SimCLR, arXiv:2002.05709).

    Attributes:
      brightness, contrast, saturation: the factor is uniform in 1 +- this, and not below 0.
      hue: the shift is uniform in +- this, of a full circle: 0 to 0.5.
      probability: how often.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.8
    field: str = "image"

    def __post_init__(self):
        require_probability(self)
        require_not_negative(self, "brightness", "contrast", "saturation")
        require(self, "hue", is_number(self.hue) and 0 <= self.hue <= 0.5, "a number from 0 to 0.5")

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        from PIL import Image, ImageEnhance

        picture = as_picture(value)
        if rng.random() >= self.probability:
            return as_pixels(picture)
        drawn = 2 * rng.random(4) - 1
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        widths = (self.brightness, self.contrast, self.saturation)
        for which in rng.permutation(4):
            if which < 3:
                if widths[which]:
                    picture = enhancers[which](picture).enhance(max(0.0, 1 + widths[which] * drawn[which]))
            elif self.hue and picture.mode == "RGB":
                hue, saturation, brightness = picture.convert("HSV").split()
                turned = np.asarray(hue) + np.uint8(round(256 * self.hue * drawn[3]) % 256)  # wraps around
                picture = Image.merge("HSV", (Image.fromarray(turned), saturation, brightness)).convert("RGB")
        return as_pixels(picture)


@dataclass(frozen=True, kw_only=True)
class Greyscale(FieldTransform):
    """Colours taken out, with as many channels as before.

    Attributes:
      probability: how often.
    """

    probability: float = 0.2
    field: str = "image"

    def __post_init__(self):
        require_probability(self)

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        picture = as_picture(value)
        if rng.random() < self.probability:
            picture = picture.convert("L").convert(picture.mode)
        return as_pixels(picture)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(FieldTransform):
    """Pillow's blur, three box blurs, with a standard deviation uniform in `sigma` (in pixels).

    Attributes:
      probability: how often.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5
    field: str = "image"

    def __post_init__(self):
        require_probability(self)
        require(self, "sigma", 0 <= self.sigma[0] <= self.sigma[1], "two numbers, 0 <= smallest <= largest")

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        from PIL import ImageFilter

        picture = as_picture(value)
        if rng.random() < self.probability:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*self.sigma)))
        return as_pixels(picture)


@dataclass(frozen=True, kw_only=True)
class Solarise(FieldTransform):
    """Values from `threshold` on inverted.

    Attributes:
      probability: how often.
    """

    threshold: int = 128
    probability: float = 0.2
    field: str = "image"

    def __post_init__(self):
        require_probability(self)
        require(self, "threshold", 0 <= self.threshold <= 256, "a number from 0 to 256")

    def apply(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        from PIL import ImageOps

        picture = as_picture(value)
        if rng.random() < self.probability:
            picture = ImageOps.solarize(picture, self.threshold)
        return as_pixels(picture)


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Several views of one picture, large and small ones stacked apart: [G, H, W, C] and [L, h, w, C].

    SwAV (arXiv:2006.09882), Sec. 3.2; DINO (arXiv:2104.14294). The picture's own field is left out of the result.

    Attributes:
      global_views: for each large view the transforms that make it, the same size of all.
      local_views: the same for the small ones; () gives no field of them.
    """

    global_views: tuple[tuple[Transform, ...], ...]
    local_views: tuple[tuple[Transform, ...], ...] = ()
    field: str = "image"
    global_field: str = "global_images"
    local_field: str = "local_images"

    def __post_init__(self):
        require(self, "global_views", bool(self.global_views), "the transforms of at least one view")

    @classmethod
    def dino(cls, num_local: int = 8, global_size: int = 224, local_size: int = 96) -> "MultiCrop":
        """Two global views and some local ones, as the authors' `main_dino.py` makes them, normalised."""

        def view(crop: RandomResizedCrop, blur: float, *more: Transform) -> tuple[Transform, ...]:
            look = (ColourJitter(), Greyscale(), GaussianBlur(probability=blur), *more)
            return (crop, FlipHorizontal(), *look, NormaliseImage())

        large = RandomResizedCrop(size=global_size, scale=(0.4, 1.0), resampling="bicubic")
        small = RandomResizedCrop(size=local_size, scale=(0.05, 0.4), resampling="bicubic")
        return cls(
            global_views=(view(large, 1.0), view(large, 0.1, Solarise())),
            local_views=(view(small, 0.5),) * num_local,
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        whole = {**example, self.field: as_picture(take(example, self.field))}  # once, and not in each crop
        out = {name: value for name, value in example.items() if name != self.field}
        for name, views in ((self.global_field, self.global_views), (self.local_field, self.local_views)):
            if views:
                out[name] = np.stack([self._view(whole, chain, rng) for chain in views])
        return out

    def _view(self, example: Example, chain: tuple[Transform, ...], rng: np.random.Generator) -> np.ndarray:
        for transform in chain:
            example = transform(example, rng)
        return np.asarray(example[self.field])
