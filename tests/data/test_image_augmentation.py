"""What changes the look of pictures, and what makes one example of two."""

import colorsys

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from axrepro.core import UserError
from axrepro.data.transforms.fields import OneHot
from axrepro.data.transforms.image_augmentation import (
    OPERATIONS,
    ColourJitter,
    GaussianBlur,
    Greyscale,
    MultiCrop,
    RandAugment,
    Solarise,
)
from axrepro.data.transforms.images import (
    CentreCrop,
    FlipHorizontal,
    NormaliseImage,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    as_picture,
    as_pixels,
)
from axrepro.data.transforms.pairs import Mixup


def generator(*seed):
    return np.random.default_rng(seed or 0)


def noise(height=20, width=24, channels=3):
    return generator(1).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height=40, width=50):
    return np.uint8(scipy.ndimage.gaussian_filter(noise(height, width).astype(float), (3, 3, 0)))


def affine(picture, *matrix):
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, fillcolor=(128, 128, 128))


# what each operation is at M = 10 with the authors' ranges, and at M = 5 with ranges that increase
AUTHORS = {
    "identity": lambda p: p,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "rotate": lambda p: p.rotate(30, fillcolor=(128, 128, 128)),
    "solarize": lambda p: p,  # from 256 on
    "color": lambda p: ImageEnhance.Color(p).enhance(1.9),
    "posterize": lambda p: ImageOps.posterize(p, 4),
    "contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.9),
    "brightness": lambda p: ImageEnhance.Brightness(p).enhance(1.9),
    "sharpness": lambda p: ImageEnhance.Sharpness(p).enhance(1.9),
    "shear_x": lambda p: affine(p, 1, 0.3, 0, 0, 1, 0),
    "shear_y": lambda p: affine(p, 1, 0, 0, 0.3, 1, 0),
    "translate_x": lambda p: affine(p, 1, 0, 24 * 150 / 331, 0, 1, 0),
    "translate_y": lambda p: affine(p, 1, 0, 0, 0, 1, 20 * 150 / 331),
}
INCREASING = {
    "rotate": lambda p: p.rotate(-15, fillcolor=(128, 128, 128)),
    "solarize": lambda p: ImageOps.solarize(p, 128),
    "color": lambda p: ImageEnhance.Color(p).enhance(0.55),
    "posterize": lambda p: ImageOps.posterize(p, 6),
    "contrast": lambda p: ImageEnhance.Contrast(p).enhance(0.55),
    "brightness": lambda p: ImageEnhance.Brightness(p).enhance(0.55),
    "sharpness": lambda p: ImageEnhance.Sharpness(p).enhance(0.55),
    "shear_x": lambda p: affine(p, 1, -0.15, 0, 0, 1, 0),
    "translate_y": lambda p: affine(p, 1, 0, 0, 0, 1, -20 * 75 / 331),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(name):
    picture = as_picture(noise())
    found = RandAugment(magnitude=10).operate(picture, name, 1)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(AUTHORS[name](picture)))
    if name in INCREASING:
        found = RandAugment(magnitude=5, severity="increasing").operate(picture, name, -1)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(INCREASING[name](picture)))
    for magnitude, severity in ((30, "authors"), (30, "increasing"), (0, "authors")):  # nothing leaves its range
        found = RandAugment(magnitude=magnitude, severity=severity).operate(as_picture(noise(channels=1)), name, -1)
        assert (found.size, found.mode) == ((24, 20), "L")


@pytest.mark.parametrize("name", ["solarize", "posterize", "brightness", "rotate", "contrast", "translate_x"])
def test_with_increasing_severity_a_larger_magnitude_changes_more(name):
    picture = as_picture(np.repeat(np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., None], 3, 2))
    changes = []
    for magnitude in (0, 3, 6, 10):
        found = RandAugment(magnitude=magnitude, severity="increasing").operate(picture, name, -1)
        changes.append(abs(np.asarray(found).astype(int) - np.asarray(picture)).mean())
    assert changes[0] == 0
    assert sorted(changes) == changes
    assert len(set(changes)) == 4


def test_operations_and_directions_are_drawn_evenly_and_applied_in_a_row():
    drawn = []

    class Recorded(RandAugment):
        def operate(self, picture, operation, sign):
            drawn.append((operation, sign))
            return super().operate(picture, operation, sign)

    augment, image, rng = Recorded(num_ops=3), noise(4, 4), generator()
    for _ in range(700):
        augment({"image": image}, rng)
    assert len(drawn) == 2100
    counts = np.unique([f"{name} {sign}" for name, sign in drawn], return_counts=True)[1]
    assert len(counts) == 28
    assert stats.chisquare(counts).pvalue > 1e-3
    drawn.clear()
    found, picture = augment({"image": noise()}, rng)["image"], as_picture(noise())
    for name, sign in list(drawn):
        picture = augment.operate(picture, name, sign)
    np.testing.assert_array_equal(found, as_pixels(picture))
    np.testing.assert_array_equal(RandAugment(num_ops=0)({"image": noise()}, rng)["image"], noise())


def test_brightness_contrast_and_saturation_are_uniform_around_one():
    image = np.full((1, 1, 3), 100, np.uint8)
    bright = ColourJitter(brightness=0.5, contrast=0.0, saturation=0.0, hue=0.0, probability=1.0)
    rng = generator()
    factors = np.array([bright({"image": image}, rng)["image"][0, 0, 0] for _ in range(1000)]) / 100
    assert stats.kstest(factors, stats.uniform(0.495, 1.01).cdf).pvalue > 1e-3  # whole levels
    two = np.array([[[50, 50, 50], [150, 150, 150]]], np.uint8)
    contrast = ColourJitter(brightness=0.0, contrast=0.5, saturation=0.9, hue=0.0, probability=1.0)
    for _ in range(20):  # grey stays grey, and the mean stays
        found = contrast({"image": two}, rng)["image"].astype(int)
        assert (found == found[..., :1]).all()
        assert abs(found.mean() - 100) <= 1
        assert 50 <= found[0, 1, 0] - found[0, 0, 0] <= 150


def test_hue_turns_the_colour_circle():
    image = smooth()
    turn = ColourJitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5, probability=1.0)
    found = turn({"image": image}, generator(5))["image"]
    angles, steps = [], range(0, 40, 7)
    for y in steps:
        for x in steps:
            before, after = (colorsys.rgb_to_hsv(*(pixel[y, x] / 255)) for pixel in (image, found))
            assert abs(before[2] - after[2]) < 0.02
            if before[1] > 0.15:
                angles.append((after[0] - before[0]) % 1)
    assert len(angles) > 5
    mean = np.angle(np.mean(np.exp(2j * np.pi * np.array(angles)))) / (2 * np.pi)
    assert all(abs((angle - mean + 0.5) % 1 - 0.5) < 0.06 for angle in angles)
    assert abs(mean) > 0.05


def test_greyscale_blur_and_solarise_are_their_formulas():
    image, rng = smooth(), generator()
    grey = Greyscale(probability=1.0)({"image": image}, rng)["image"]
    assert abs(grey - (image @ [0.299, 0.587, 0.114])[..., None]).max() <= 1
    image = noise(60, 60)
    blurred = GaussianBlur(sigma=(3.0, 3.0), probability=1.0)({"image": image}, rng)["image"]
    wanted = scipy.ndimage.gaussian_filter(image.astype(float), (3, 3, 0), mode="nearest")
    inside = (slice(12, -12), slice(12, -12))
    assert abs(blurred[inside] - wanted[inside]).mean() < 1  # three box blurs are nearly Gaussian
    solarised = Solarise(threshold=100, probability=1.0)({"image": image}, rng)["image"]
    np.testing.assert_array_equal(solarised, np.where(image < 100, image, 255 - image))
    for transform in (Greyscale, GaussianBlur, Solarise, ColourJitter):
        np.testing.assert_array_equal(transform(probability=0.0)({"image": image}, rng)["image"], image)


def test_each_view_goes_through_its_own_chain():
    large, small = RandomResizedCrop(size=8), RandomResizedCrop(size=4, scale=(0.05, 0.3))
    crops = MultiCrop(
        global_views=((large, FlipHorizontal()), (large, Solarise(threshold=0, probability=1.0))),
        local_views=((small, NormaliseImage()),) * 3,
    )
    example = {"image": noise(), "label": 3}
    found, rng = crops(example, generator(4)), generator(4)
    assert found.keys() == {"global_images", "local_images", "label"}
    first = FlipHorizontal()(large(example, rng), rng)["image"]
    second = 255 - large(example, rng)["image"]
    np.testing.assert_array_equal(found["global_images"], [first, second])
    rng.random()  # Solarise drew whether to
    third = [NormaliseImage()(small(example, rng), rng)["image"] for _ in range(3)]
    np.testing.assert_array_equal(found["local_images"], third)
    assert found["local_images"].dtype == np.float32


def test_dino_has_two_large_and_many_small_views():
    found = MultiCrop.dino(num_local=3, global_size=16, local_size=6)({"image": noise()}, generator())
    assert {name: value.shape for name, value in found.items()} == {
        "global_images": (2, 16, 16, 3),
        "local_images": (3, 6, 6, 3),
    }


def test_mixup_is_its_equation_on_inputs_and_labels():
    examples = [
        {"image": np.float32(generator(i).random((2, 3, 3))), "label": np.eye(4, dtype=np.float32)[i], "name": str(i)}
        for i in range(2)
    ]
    found = Mixup(alpha=0.4).mix(*examples, generator(9))
    weight = generator(9).beta(0.4, 0.4)
    for name in ("image", "label"):
        first, second = (example[name].astype(float) for example in examples)
        np.testing.assert_allclose(found[name], weight * first + (1 - weight) * second, atol=1e-6)
        assert found[name].dtype == np.float32
    assert found["name"] == "0"
    rng = generator(3)
    weights = [Mixup(alpha=0.4).mix(*examples, rng)["label"][0] for _ in range(500)]
    assert stats.kstest(weights, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_mixup_refuses_what_has_no_mean():
    image = np.zeros((2, 2, 3), np.float32)
    for first, second, message in (
        ({"image": image, "label": 3}, {"image": image, "label": 3}, "'label' is int; put .* OneHot"),
        ({"image": noise()}, {"image": noise()}, "'image' is uint8; put NormaliseImage"),
        ({"image": image}, {"image": image[:1]}, r"equal shapes.*\(2, 2, 3\) and \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixup().mix(first, second, generator())
    for how in ({"alpha": 0.0}, {"probability": 2.0}, {"fields": ()}):
        with pytest.raises(UserError, match=f"Mixup.{next(iter(how))}"):
            Mixup(**how)


def test_one_hot_labels_are_smoothed_to_a_distribution():
    for smoothing in (0.0, 0.1):
        found = OneHot(num_classes=5, smoothing=smoothing)({"label": np.int32(3)}, generator())["label"]
        np.testing.assert_allclose(found, [smoothing / 5 + (1 - smoothing) * (i == 3) for i in range(5)], rtol=1e-6)
    for label in (5, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="not a class from 0 to 4"):
            OneHot(num_classes=5)({"label": label}, generator())


@pytest.mark.parametrize(
    "transform",
    [
        RandAugment(),
        RandAugment(severity="increasing", num_ops=4),
        ColourJitter(probability=1.0),
        Greyscale(),
        GaussianBlur(),
        Solarise(),
        MultiCrop.dino(num_local=2, global_size=8, local_size=4),
        RandomResizedCrop(size=9),
        RandomCrop(size=9, padding=2),
        FlipHorizontal(),
        Resize(size=9),
        CentreCrop(size=9),
        NormaliseImage(),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_an_example_depends_on_its_generator_alone_and_is_not_changed(transform):
    image = noise()
    image.flags.writeable = False
    example = {"image": image, "label": 1}
    made = []
    for index in (0, 0, *range(1, 12)):
        found = transform(example, generator(7, 1, index))
        made.append(b"".join(found[name].tobytes() for name in sorted(found) if name != "label"))
        assert found["label"] == 1
    assert example == {"image": image, "label": 1}
    np.testing.assert_array_equal(image, noise())
    assert made[0] == made[1]
    fixed = isinstance(transform, Resize | CentreCrop | NormaliseImage)
    assert (len(set(made)) == 1) == fixed
