"""Pictures: which there are, how they are decoded, and what crops, resizes and flips do to their pixels."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats

from axrepro.core import UserError
from axrepro.core.config import override
from axrepro.data.records import BadRecord
from axrepro.data.sources.images import CaptionedImages, ImageFolders
from axrepro.data.transforms.images import (
    CentreCrop,
    DecodeImage,
    FlipHorizontal,
    NormaliseImage,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, channels=3, seed=0):
    return generator(seed).integers(0, 256, (height, width, channels), np.uint8)


def photo(height, width):
    """Smooth, as photographs are, so that JPEG and scaling keep it."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y * x + 1), np.sin(4 * y - 6 * x)]
    return np.uint8(np.stack(waves, -1) * 100 + 128)


def file(image, kind="PNG", **how) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())).save(out, kind, **how)
    return out.getvalue()


def decode(data, rng=None, **how):
    return DecodeImage(**how)({"image": data}, rng or generator())["image"]


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "pictures"
    for i in range(60):
        path = (
            root / ("dog", "ape", "cat")[i % 3] / ("a/deep" if i % 5 == 0 else "") / f"{i}.{'PNG' if i % 2 else 'png'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file(np.full((2, 3, 3), i, np.uint8)))
    (root / "ape/notes.txt").write_text("no picture")
    (root / ".hidden").mkdir()
    return root


def test_class_folders_are_numbered_by_name_and_split_without_loss(folders):
    source = ImageFolders(str(folders), holdout=4)
    assert source.classes() == ("ape", "cat", "dog")
    seen = {}
    for split in ("train", "eval"):
        records = source.open(split)
        assert len(records) == len(list(records))
        for i, record in enumerate(records):
            value = int(decode(record["image"])[0, 0, 0])
            assert source.classes()[record["label"]] == ("dog", "ape", "cat")[value % 3]
            assert record["name"] == records.name(i)
            seen.setdefault(split, []).append(value)
    assert sorted(seen["train"] + seen["eval"]) == list(range(60))
    assert 5 < len(seen["eval"]) < 30


def test_an_eval_root_takes_the_classes_of_the_root(folders, tmp_path):
    (tmp_path / "eval/dog").mkdir(parents=True)
    (tmp_path / "eval/dog/x.png").write_bytes(file(noise(2, 2)))
    source = ImageFolders(str(folders), eval_root=str(tmp_path / "eval"))
    assert [record["label"] for record in source.open("eval")] == [2]
    assert len(source.open("train")) == 60
    (tmp_path / "eval/eel").mkdir()
    with pytest.raises(UserError, match=r"eel is a class that .* does not have"):
        source.open("eval")


def test_records_survive_a_pickle(folders):
    records = ImageFolders(str(folders)).open("train")
    assert pickle.loads(pickle.dumps(records))[7] == records[7]


def test_bad_folders_are_named(folders, tmp_path):
    with pytest.raises(UserError, match=r"cannot list the folder .*nowhere"):
        ImageFolders(str(tmp_path / "nowhere")).open("train")
    with pytest.raises(UserError, match="has no folders"):
        ImageFolders(str(folders / "dog/a/deep")).open("train")
    (folders / "bee").mkdir()
    with pytest.raises(UserError, match="bee has no pictures"):
        ImageFolders(str(folders)).open("train")
    (folders / "bee").rmdir()
    with pytest.raises(UserError, match="none is in the eval split"):
        ImageFolders(str(folders), holdout=0).open("eval")
    with pytest.raises(UserError, match="holdout=1"):
        ImageFolders(str(folders), holdout=1)
    records = ImageFolders(str(folders)).open("train")
    (folders / "ape/1.PNG").unlink()
    broken = [i for i in range(len(records)) if records.name(i).endswith("ape/1.PNG")]
    with pytest.raises(BadRecord, match=r"cannot read .*ape/1\.PNG"):
        records[broken[0]]


@pytest.fixture
def captioned(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(30):
        (tmp_path / f"sub/{i}.png").write_bytes(file(np.full((2, 2, 3), i, np.uint8)))
    pairs = [(f"sub/{i}.png", f"picture {i}, für {n}") for i in range(30) for n in range(2)]
    lines = [f'{{"file_name": "{name}", "text": "{text}"}}\n' for name, text in pairs]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))  # every other line is empty
    (tmp_path / "all.tsv").write_text("text\tmore\tfile_name\r\n" + "".join(f"{t}\t-\t{n}\r\n" for n, t in pairs))
    return tmp_path


@pytest.mark.parametrize("name", ["all.jsonl", "all.tsv"])
def test_captions_come_with_their_pictures_and_stay_together(captioned, name):
    source = CaptionedImages(str(captioned), str(captioned / name), holdout=4)
    numbers = {}
    for split in ("train", "eval"):
        records = pickle.loads(pickle.dumps(source.open(split)))
        for record in records:
            value = decode(record["image"])[0, 0, 0]
            assert record["text"] in (f"picture {value}, für 0", f"picture {value}, für 1")
            numbers.setdefault(split, []).append(record["text"])
    assert len(set(numbers["train"] + numbers["eval"])) == 60
    pictures = {split: {text.split(",")[0] for text in texts} for split, texts in numbers.items()}
    assert not pictures["train"] & pictures["eval"]


def test_eval_captions_are_a_file_of_their_own(captioned):
    (captioned / "eval.jsonl").write_text('{"file_name": "sub/3.png", "text": "three"}')
    source = CaptionedImages(str(captioned), str(captioned / "all.tsv"), eval_captions=str(captioned / "eval.jsonl"))
    assert [record["text"] for record in source.open("eval")] == ["three"]
    assert len(source.open("train")) == 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"file_name": "sub/1.png", "text": "a"}\n{"file_name"\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", "\n[1]\n", r"a\.jsonl:2 holds a JSON list"),
        ("a.tsv", "file_name\ttext\nsub/../../1.png\ta", r"a\.tsv:2 names .*which is not below"),
        ("a.tsv", "file_name\ttext\n/etc/1.png\ta", r"a\.tsv:2 names '/etc/1\.png', which is not below"),
        ("a.tsv", "file_name\ttext\na\0.png\ta", r"a\.tsv:2 names .*which is not below"),
        ("a.jsonl", '{"file_name": "sub/1.png", "txt": "a"}', r"a\.jsonl:1 has no field 'text'; did you mean 'txt'"),
        ("a.jsonl", '{"file_name": 1, "text": "a"}', r"a\.jsonl:1: the field 'file_name' is 1, not a text"),
        ("a.tsv", "file_name\ttext\nsub/1.png\ta\nsub/1.png\n", r"a\.tsv:3 has 1 columns, and the first line names 2"),
        ("a.tsv", "sub/1.png\ta\n", r"a\.tsv:1 names the columns, and none is 'file_name'"),
        ("a.tsv", b"file_name\ttext\nsub/1.png\t\xff\n", r"a\.tsv:2 is not UTF-8"),
        ("a.tsv", "file_name\ttext\n", r"a\.tsv.* has no documents"),
    ],
)
def test_a_bad_caption_is_told_with_file_and_line(captioned, name, content, message):
    (captioned / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        CaptionedImages(str(captioned), str(captioned / name), holdout=0).open("train")


def test_a_missing_picture_is_told_with_the_line_that_names_it(captioned):
    (captioned / "a.tsv").write_text("file_name\ttext\nsub/1.png\ta\nsub/nowhere.png\tb\n")
    records = CaptionedImages(str(captioned), str(captioned / "a.tsv"), holdout=0).open("train")
    assert records[0]["text"] == "a"
    with pytest.raises(BadRecord, match=r"a\.tsv:3 names a picture that cannot be read: .*nowhere\.png"):
        records[1]
    with pytest.raises(UserError, match=r"captions='a\.csv'"):
        CaptionedImages(str(captioned), "a.csv")


def test_lossless_files_give_their_pixels_back():
    image = noise(7, 5)
    for kind in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(file(image, kind)), image)
    grey = noise(7, 5, 1)
    np.testing.assert_array_equal(decode(file(grey), mode="grey"), grey)
    np.testing.assert_array_equal(decode(file(grey)), np.repeat(grey, 3, 2))
    luma = (image @ [299, 587, 114] / 1000)[..., None]
    assert abs(decode(file(image), mode="grey") - luma).max() <= 1
    see_through = np.concatenate([image, noise(7, 5, 1, seed=1)], -1)
    np.testing.assert_array_equal(decode(file(see_through)), image)
    palette = Image.fromarray(image).quantize(8)
    np.testing.assert_array_equal(decode(file(palette)), np.asarray(palette.convert("RGB")))


def test_of_16_bits_the_upper_eight_are_kept():
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1023
    np.testing.assert_array_equal(decode(file(deep), mode="grey")[..., 0], deep // 256)
    with pytest.raises(ValueError, match="32 bits"):
        decode(file(np.ones((3, 3), np.float32), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = file(noise(6, 10), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
    np.testing.assert_array_equal(decode(stored), upright)
    crop = RandomResizedCrop(size=(5, 4))
    in_two = crop({"image": upright}, generator(3))["image"]
    np.testing.assert_array_equal(decode(stored, generator(3), crop=crop), in_two)
    # of a JPEG only every eighth pixel is decoded, of the same places
    large = file(photo(600, 1000), "JPEG", quality=95, exif=exif)
    in_one, in_two = decode(large, generator(5), crop=crop), crop({"image": decode(large)}, generator(5))["image"]
    assert abs(in_one.astype(int) - in_two).mean() < 1


def test_a_jpeg_is_decoded_no_larger_than_needed(monkeypatch):
    sizes, load = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: sizes.append(self.size) or load(self, *args))
    data = file(photo(900, 1200), "JPEG")
    assert decode(data, crop=Resize(size=100)).shape == (100, 133, 3)
    assert decode(data, crop=Resize(size=113)).shape == (113, 150, 3)
    assert decode(data, crop=RandomResizedCrop(size=100, scale=(0.25, 0.25), ratio=(1, 1))).shape == (100, 100, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(file(photo(800, 1600), "JPEG", exif=exif), crop=Resize(size=(400, 100))).shape == (400, 100, 3)
    assert sizes == [(150, 113), (300, 225), (300, 225), (200, 400)]


def planted(kind):
    whole = file(noise(40, 40), "JPEG" if kind == "cut jpeg" else "PNG")
    return {
        "cut png": whole[: len(whole) // 2],
        "cut jpeg": whole[: len(whole) // 2],
        "text": b"hello, this is no picture",
        "empty": b"",
        "no bytes": "text",
        "header": whole[:30],
    }[kind]


@pytest.mark.parametrize("kind", ["cut png", "cut jpeg", "text", "empty", "no bytes", "header"])
@pytest.mark.parametrize("crop", [None, Resize(size=8)])
def test_what_is_no_whole_picture_is_refused(kind, crop):
    messages = {
        "text": "no picture that Pillow knows; they begin b'hello",
        "header": "no picture that Pillow knows",
        "empty": "0 bytes",
        "no bytes": "str, not the bytes",
    }
    with pytest.raises(ValueError, match=messages.get(kind, "cannot decode the picture")):
        decode(planted(kind), crop=crop)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    flips=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_damage_is_a_value_error_or_a_picture(kind, flips):
    data = bytearray(file(noise(9, 11), kind))
    for place, value in flips:
        data[place % len(data)] ^= value
    try:
        picture = decode(bytes(data), crop=Resize(size=(4, 4)))
    except ValueError:
        return
    assert picture.shape == (4, 4, 3)


def triangle_weights(low, high, size, length):
    """[size, length]: the weights of a bilinear filter, as wide as the pixels of the result are apart."""
    weights = np.zeros((size, length))
    step = (high - low) / size
    for i in range(size):
        for j in range(length):
            distance = abs(j + 0.5 - (low + (i + 0.5) * step)) / max(step, 1)
            weights[i, j] = max(0, 1 - distance)
        weights[i] /= weights[i].sum()
    return weights


@pytest.mark.parametrize("size", [(5, 9), (40, 31)])
def test_a_resized_crop_is_the_average_under_triangles(size):
    image, crop = noise(30, 20), RandomResizedCrop(size=size, scale=(0.3, 0.6))
    (left, top, right, bottom), _ = crop.plan(30, 20, generator(4))
    down, across = triangle_weights(top, bottom, size[0], 30), triangle_weights(left, right, size[1], 20)
    wanted = np.einsum("ih,jw,hwc->ijc", down, across, image)
    assert abs(crop({"image": image}, generator(4))["image"] - wanted).max() <= 1


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 50, (8, 30)])
def test_resize_agrees_with_torch(resampling, size):
    import torch

    image = noise(20, 33) // 2 + 64  # so that nothing overshoots 8 bits between the two directions
    found = Resize(size=size, resampling=resampling)({"image": image}, generator())["image"]
    target = size if isinstance(size, tuple) else (size, size * 33 // 20)
    channels_first = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(channels_first, target, mode=resampling, antialias=True)
    wanted = wanted[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert found.shape == wanted.shape
    # rounded to 8 bits after each direction; the magnitudes of bicubic weights sum to at most 1.25
    assert abs(found - wanted).max() <= 0.5 * 1.25 + 0.5


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_random_boxes_lie_within_the_picture_and_the_limits(height, width, seed):
    crop = RandomResizedCrop(size=8, scale=(0.1, 0.5), ratio=(0.5, 2.0))
    (left, top, right, bottom), size = crop.plan(height, width, generator(seed))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert size == (8, 8)
    if 60 <= min(height, width) <= max(height, width) <= 2 * min(height, width):  # a box fits, and rounds to little
        assert 0.09 < w * h / (height * width) < 0.53
        assert 0.45 < w / h < 2.2


def test_random_boxes_have_even_areas_ratios_and_places():
    crop, rng = RandomResizedCrop(size=8, scale=(0.1, 0.2), ratio=(1.0, 4.0)), generator(1)
    boxes = np.array([crop.plan(10_000, 10_000, rng).box for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    even = (w * h / 1e8 - 0.1) / 0.1, np.log2(w / h) / 2, boxes[:, 0] / (1e4 - w), boxes[:, 1] / (1e4 - h)
    assert min(stats.kstest(values, "uniform").pvalue for values in even) > 1e-3
    narrow = RandomResizedCrop(size=8, scale=(0.5, 1.0)).plan(1000, 30, rng)
    assert narrow.box == (0, 480, 30, 520)  # nothing fits: the largest of ratio 3 / 4 in the middle


def test_crops_are_windows_of_the_picture():
    image = noise(9, 14)
    np.testing.assert_array_equal(CentreCrop(size=(3, 4))({"image": image}, generator())["image"], image[3:6, 5:9])
    image = np.arange(30, dtype=np.float32).reshape(5, 6, 1)  # normalised ones too
    for edge, mode in (("zeros", "constant"), ("mirror", "reflect")):
        crop, rng = RandomCrop(size=4, padding=1, edge=edge), generator(2)
        around = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode=mode)
        windows = {around[i : i + 4, j : j + 4].tobytes(): (i, j) for i in range(4) for j in range(5)}
        seen = [windows[crop({"image": image}, rng)["image"].tobytes()] for _ in range(2000)]
        counts = np.unique(seen, axis=0, return_counts=True)[1]
        assert len(counts) == 20
        assert stats.chisquare(counts).pvalue > 1e-3
    for crop in (CentreCrop(size=6), RandomCrop(size=6)):
        with pytest.raises(ValueError, match=r"has 5 x 6 pixels .* and 6 x 6 are to be cut out"):
            crop({"image": image}, generator())


def test_flips_swap_left_and_right_as_often_as_said():
    image, rng = noise(3, 4), generator()
    np.testing.assert_array_equal(FlipHorizontal(probability=1.0)({"image": image}, rng)["image"], np.fliplr(image))
    flipped = [(FlipHorizontal(probability=0.3)({"image": image}, rng)["image"] != image).any() for _ in range(1000)]
    assert stats.binomtest(sum(flipped), 1000, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_its_formula_and_can_be_undone(channels):
    image = noise(5, 6, channels)[:, ::-1]
    normalise = NormaliseImage(mean=(0.1, 0.2, 0.3)[:channels], std=(0.5, 0.6, 0.7)[:channels])
    found = normalise({"image": image}, generator())["image"]
    wanted = np.empty(image.shape)
    for place in np.ndindex(*image.shape):
        wanted[place] = (image[place] / 255 - normalise.mean[place[2]]) / normalise.std[place[2]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(normalise.invert(found), image / 255, atol=1e-6)
    with pytest.raises(ValueError, match="float32"):
        normalise({"image": found}, generator())
    with pytest.raises(ValueError, match="has 3 means, and the picture 1 channel"):
        NormaliseImage()({"image": image[..., :1]}, generator())


def test_configs_refuse_what_cannot_be():
    for make, message in (
        (lambda: Resize(size=0), "Resize.size=0"),
        (lambda: CentreCrop(size=(3, -1)), "CentreCrop.size"),
        (lambda: RandomResizedCrop(size=3, scale=(0.5, 0.1)), "scale"),
        (lambda: RandomResizedCrop(size=3, ratio=(0, 1)), "ratio"),
        (lambda: FlipHorizontal(probability=1.5), "probability"),
        (lambda: NormaliseImage(std=(0.0, 1.0, 1.0)), "std"),
        (lambda: NormaliseImage(mean=(0.5,)), "std"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    with pytest.raises(ValueError, match="no field 'image'; did you mean 'images'"):
        FlipHorizontal()({"images": 0}, generator())
    changed = override(DecodeImage(crop=Resize(size=8)), {"crop.size": "(4,6)"})
    assert changed.crop.size == (4, 6)
