"""Sound: which there is, how it is decoded, and what its features are."""

import io
import os
import pickle
import tarfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from axrepro.core import UserError
from axrepro.data.records import BadRecord
from axrepro.data.sources.audio import AudioFiles
from axrepro.data.transforms.audio import AddNoise, CropOrPadAudio, DecodeAudio, LogMel, NormaliseFeatures, SpecAugment

SHARED = Path(os.environ.get("AXREPRO_DATA", Path(__file__).resolve().parents[2].parent / "shared/data"))
DIGITS = SHARED / "spoken_digits/recordings.tar.xz"
FIELDS = r"(?P<label>\d)_(?P<speaker>\w+)_(?P<index>\d+)\.wav"


def generator(*seed):
    return np.random.default_rng(seed or 0)


def noise(size, seed=0, scale=0.1):
    return (scale * generator(seed).standard_normal(size)).astype(np.float32)


def wav(samples, rate=8000) -> bytes:
    """16 bits, written by the standard library; samples are [N] or [N, channels]."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def encoded(samples, rate=8000, kind="FLAC", **how) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, **how)
    return out.getvalue()


def decode(data, rate=8000):
    return DecodeAudio(rate=rate)({"audio": data}, generator())["audio"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same 60 recordings in a folder and in archives of every kind."""
    root = tmp_path_factory.mktemp("sounds")
    (root / "folder/deep").mkdir(parents=True)
    for i in range(60):
        path = root / "folder" / ("deep" if i % 2 else "") / f"{i % 10}_{'ab'[i % 2]}_{i // 10}.wav"
        path.write_bytes(wav(noise(20 + i, i)))
    (root / "folder/README.md").write_text("no sound")
    (root / "folder/._0_a_0.wav").write_text("no sound either")
    for kind in ("", ":gz", ":xz", ":bz2"):
        with tarfile.open(root / f"all.tar{kind.replace(':', '.')}", f"w{kind}") as archive:
            archive.add(root / "folder", "top")
    for name, packing in (("deflated.zip", zipfile.ZIP_DEFLATED), ("stored.zip", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(root / name, "w", packing) as archive:
            for path in sorted((root / "folder").rglob("*.*")):
                archive.write(path, path.relative_to(root))
    return root


@pytest.mark.parametrize(
    "pattern",
    ["folder/**/[0-9]*.wav", "all.tar", "all.tar.gz", "all.tar.xz", "all.tar.bz2", "deflated.zip", "stored.zip"],
)
def test_archives_hold_what_the_folder_holds(stored, pattern):
    source = AudioFiles(f"{stored}/{pattern}", holdout=5, name_fields=FIELDS)
    seen, names = {}, set()
    for split in ("train", "eval"):
        records = pickle.loads(pickle.dumps(source.open(split)))
        for i in reversed(range(len(records))):
            record = records[i]
            number = int(record["index"]) * 10 + record["label"]
            assert record["audio"] == wav(noise(20 + number, number))
            assert record["speaker"] == "ab"[number % 2]
            assert record["name"] == records.name(i)
            seen.setdefault(split, []).append(number)
            names.add(record["name"])
    assert sorted(seen["train"] + seen["eval"]) == list(range(60))
    assert 4 < len(seen["eval"]) < 25
    assert len(names) == 60
    if "*" not in pattern:
        assert all(name.startswith(f"{stored}/{pattern}:") for name in names)


def test_names_can_tell_the_splits_and_folders_the_labels(stored):
    source = AudioFiles(f"{stored}/all.tar", eval_names=r"_[01]\.wav$", name_fields=FIELDS)
    assert {record["index"] for record in source.open("eval")} == {"0", "1"}
    assert {record["index"] for record in source.open("train")} == {"2", "3", "4", "5"}
    source = AudioFiles(f"{stored}/all.tar", holdout=0, name_fields=r"(?P<label>\w+)/[^/]+", labels=("top", "deep"))
    labels = [record["label"] for record in source.open("train")]
    assert sorted(labels) == [0] * 30 + [1] * 30
    source = AudioFiles(f"{stored}/folder/**/*_*_*.wav", eval_pattern=f"{stored}/folder/deep/*.wav")
    assert len(source.open("eval")) == len(source.open("train")) == 30
    assert set(source.open("eval")[0]) == {"audio", "name"}


def test_bad_sources_are_named(stored, tmp_path):
    whole = (stored / "all.tar").read_bytes()
    for name, data in (
        ("cut.tar", whole[: len(whole) // 2]),
        ("cut.tar.xz", (stored / "all.tar.xz").read_bytes()[:2000]),
        ("cut.tar.gz", (stored / "all.tar.gz").read_bytes()[:2000]),
        ("cut.zip", (stored / "stored.zip").read_bytes()[:2000]),
        ("text.tar", b"this is no archive"),
        ("text.zip", b"this is no archive"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"cannot read {tmp_path}/{name}"):
            AudioFiles(f"{tmp_path}/{name}").open("train")
    damaged = bytearray((stored / "deflated.zip").read_bytes())
    with zipfile.ZipFile(stored / "deflated.zip") as archive:
        start = archive.getinfo("folder/0_a_0.wav").header_offset + 30 + len("folder/0_a_0.wav")
    damaged[start : start + 20] = b"\xff" * 20
    (tmp_path / "damaged.zip").write_bytes(damaged)
    records = AudioFiles(f"{tmp_path}/damaged.zip", holdout=0).open("train")
    (place,) = (i for i in range(60) if records.name(i).endswith("folder/0_a_0.wav"))
    with pytest.raises(BadRecord, match=r"cannot unpack .*damaged\.zip:folder/0_a_0\.wav"):
        records[place]
    one = f"{stored}/all.tar"
    for how, message in (
        ({"name_fields": r"(?P<label>\d)\.wav"}, r"all\.tar:top/.*wav is not named as name_fields="),
        ({"name_fields": r"\d_(?P<label>\w)_\d\.wav"}, "has the label 'a', which is no whole number"),
        ({"name_fields": r"\d_(?P<label>\w)_\d\.wav", "labels": ("a", "c")}, "label 'b', which labels does not list"),
        ({"eval_names": "nothing"}, "matches none of the files"),
        ({"name_fields": "("}, "name_fields='\\(': it takes a regular expression"),
        ({"eval_names": "x", "eval_pattern": "y"}, "None where eval_pattern is given"),
    ):
        with pytest.raises(UserError, match=message):
            AudioFiles(one, **how).open("eval" if "eval_names" in how else "train")


@pytest.mark.skipif(not DIGITS.exists(), reason=f"needs the recordings at {DIGITS}")
def test_every_spoken_digit_is_found_and_decodes():
    train, held_out = (
        AudioFiles(str(DIGITS), name_fields=FIELDS, eval_names=r"_[0-4]\.wav$").open(split)
        for split in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (2700, 300)
    assert np.bincount([record["label"] for record in held_out]).tolist() == [30] * 10
    mel, lengths = LogMel(rate=8000, num_mels=40, window_size=200, hop=80, fft_size=256), []
    for i in range(0, 2700, 50):
        samples = decode(train[i]["audio"])
        features = mel({"audio": samples}, generator())["audio"]
        assert features.shape == (1 + len(samples) // 80, 40)
        assert np.isfinite(features).all()
        lengths.append(len(samples) / 8000)
    assert 0.1 < np.median(lengths) < 1


def test_samples_are_those_of_the_file():
    samples = noise(500)
    exact = np.round(samples * 32767).astype(np.float32) / 32768
    for data in (wav(samples), encoded(exact, kind="FLAC"), encoded(exact, kind="WAV", subtype="FLOAT")):
        found = decode(data)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact, atol=1e-7)
    stereo = noise((500, 2))
    np.testing.assert_allclose(decode(wav(stereo)), np.round(stereo * 32767).mean(1) / 32768, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [(8000, 16000), (44100, 16000)])
def test_a_resampled_tone_is_the_tone_at_the_new_rate(before, after):
    tone = lambda rate: 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    found = decode(encoded(tone(before), before, "WAV", subtype="FLOAT"), after)
    assert len(found) == after
    np.testing.assert_allclose(found[2000:-2000], tone(after)[2000:-2000], atol=1e-4)


def test_what_is_no_whole_sound_is_refused():
    samples = noise(4000)
    for data, message in (
        (b"", "0 bytes"),
        ("text", "str, not the bytes"),
        (b"hello, this is no sound", "Format not recognised"),
        (wav(samples)[:5000], "cut off: 3044 bytes are missing"),
        (wav(samples)[:20], "cut off"),
        (encoded(samples)[:3000], "cannot decode the sound file"),
        (encoded(samples, kind="OGG")[:3000], "no samples|cannot decode"),
        (wav(samples[:0]), "no samples"),
        (encoded(np.float32([0, np.nan]), kind="WAV", subtype="FLOAT"), "no finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(data)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["WAV", "FLAC", "OGG"]),
    flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_damage_is_a_value_error_or_a_sound(kind, flips):
    data = bytearray(encoded(noise(300), 16000, kind))
    for place, value in flips:
        data[place % len(data)] ^= value
    try:
        samples = decode(bytes(data), 16000)
    except ValueError:
        return
    assert samples.ndim == 1
    assert np.isfinite(samples).all()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), length=st.integers(1, 30), seed=st.integers(0, 99))
@pytest.mark.parametrize("place", ["start", "middle", "random"])
def test_cropping_keeps_a_stretch_and_padding_adds_zeros(place, size, length, seed):
    samples = np.arange(1, size + 1, dtype=np.float32)
    cut = CropOrPadAudio(length=length, place=place, mask_field="mask")
    found = cut({"audio": samples}, generator(seed))
    kept = found["audio"][found["mask"]]
    assert (len(found["audio"]), len(kept)) == (length, min(size, length))
    np.testing.assert_array_equal(np.diff(kept), 1)
    assert not found["audio"][~found["mask"]].any()
    before, after = kept[0] - 1, size - kept[-1]
    if length > size:
        before, after = np.flatnonzero(found["mask"])[0], length - 1 - np.flatnonzero(found["mask"])[-1]
    assert place != "start" or before == 0
    assert place != "middle" or after - before in (0, 1)
    wide = CropOrPadAudio(length=length, place=place)({"audio": np.stack([samples, samples], 1)}, generator(seed))
    np.testing.assert_array_equal(wide["audio"], np.stack([found["audio"]] * 2, 1))


def test_random_places_are_all_as_likely():
    cut, rng = CropOrPadAudio(length=4, place="random"), generator()
    starts = [int(cut({"audio": np.arange(10.0)}, rng)["audio"][0]) for _ in range(700)]
    assert stats.chisquare(np.bincount(starts, minlength=7)).pvalue > 1e-3


def test_features_are_a_loop_over_frames_frequencies_and_filters():
    mel = LogMel(
        rate=1000, num_mels=3, window_size=8, hop=3, fft_size=16, scale="htk", norm="none", low=50.0, padding="none"
    )
    samples = noise(20)
    to_mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(to_mel(50), to_mel(500), 5)]
    wanted = np.zeros((1 + (20 - 8) // 3, 3))
    for t in range(len(wanted)):
        for m in range(3):
            for f in range(9):
                value = sum(
                    samples[3 * t + n] * (0.5 - 0.5 * np.cos(2 * np.pi * n / 8)) * np.exp(-2j * np.pi * f * n / 16)
                    for n in range(8)
                )
                hertz, (left, peak, right) = f * 1000 / 16, edges[m : m + 3]
                height = max(0, min((hertz - left) / (peak - left), (right - hertz) / (right - peak)))
                wanted[t, m] += height * abs(value) ** 2
    found = mel({"audio": samples}, generator())["audio"]
    np.testing.assert_allclose(found, np.log(np.maximum(wanted, 1e-10)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"fft_size": 512, "scale": "htk", "power": 1.0},
        {"padding": "reflect", "window": "hamming", "norm": "none", "log": "10"},
        {"padding": "none", "low": 60.0, "high": 7000.0, "window": "blackman"},
    ],
)
def test_features_agree_with_librosa_and_torch(how):
    import librosa
    import torch

    mel, samples = LogMel(rate=16000, num_mels=40, hop=150, **how), noise(5000)
    found = mel({"audio": samples}, generator())["audio"]
    size = mel.fft_size or 400
    energy = librosa.feature.melspectrogram(
        y=samples,
        sr=16000,
        n_fft=size,
        win_length=400,
        hop_length=150,
        window="hann" if mel.window == "hann" else mel.window,
        center=mel.padding != "none",
        pad_mode="constant" if mel.padding == "zeros" else "reflect",
        power=mel.power,
        n_mels=40,
        fmin=mel.low,
        fmax=mel.high,
        htk=mel.scale == "htk",
        norm="slaney" if mel.norm == "slaney" else None,
    ).T
    logarithm = np.log if mel.log == "e" else np.log10
    np.testing.assert_allclose(found, logarithm(np.maximum(energy, 1e-10)), rtol=1e-4, atol=1e-4)
    window = {"hann": torch.hann_window, "hamming": torch.hamming_window, "blackman": torch.blackman_window}[mel.window]
    spectrum = torch.stft(
        torch.from_numpy(samples),
        size,
        hop_length=150,
        win_length=400,
        window=window(400),
        center=mel.padding != "none",
        pad_mode="constant" if mel.padding == "zeros" else "reflect",
        return_complex=True,
    )
    filters = librosa.filters.mel(
        sr=16000,
        n_fft=size,
        n_mels=40,
        fmin=mel.low,
        fmax=mel.high,
        htk=mel.scale == "htk",
        norm="slaney" if mel.norm == "slaney" else None,
    )
    energy = filters @ (spectrum.abs().numpy() ** mel.power)
    np.testing.assert_allclose(found, logarithm(np.maximum(energy.T, 1e-10)), rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 400),
    window=st.integers(16, 60),
    hop=st.integers(1, 80),
    padding=st.sampled_from(["none", "zeros", "reflect"]),
)
def test_the_number_of_frames_is_the_formula(size, window, hop, padding):
    mel = LogMel(rate=8000, num_mels=2, window_size=window, hop=hop, padding=padding)
    beyond = 0 if padding == "none" else window // 2
    enough = size + 2 * beyond >= window and (padding != "reflect" or size > beyond)
    if not enough:
        with pytest.raises(ValueError, match=f"the sound has {size} samples, and LogMel needs"):
            mel({"audio": noise(size)}, generator())
        return
    frames = 1 + (size + 2 * beyond - window) // hop
    assert mel({"audio": noise(size)}, generator())["audio"].shape == (frames, 2)


def test_features_refuse_what_they_cannot_be_made_of():
    for value in (wav(noise(10)), noise((10, 2)), np.arange(500)):
        with pytest.raises(ValueError, match="not a float array of rank 1; put DecodeAudio before"):
            LogMel(rate=8000)({"audio": value}, generator())
    with pytest.raises(UserError, match=r"LogMel\.num_mels=400: it takes fewer filters: \d+ hold no frequency"):
        LogMel(rate=8000, num_mels=400)({"audio": noise(900)}, generator())
    for how, message in (
        ({"high": 5000.0}, r"rate / 2 = 4000\.0"),
        ({"low": 4000.0}, "LogMel.high"),
        ({"fft_size": 300}, "window_size=400"),
        ({"floor": 0.0}, "floor"),
    ):
        with pytest.raises(UserError, match=message):
            LogMel(rate=8000, **how)


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 30.0])
def test_noise_has_the_asked_for_ratio(decibels):
    samples = noise(5000)
    found = AddNoise(decibels=(decibels, decibels))({"audio": samples}, generator(1))["audio"]
    added = (found - samples).astype(float)
    ratio = np.mean(samples.astype(float) ** 2) / np.mean(added**2)
    assert abs(10 * np.log10(ratio) - decibels) < 1e-2
    assert abs(np.corrcoef(added, samples)[0, 1]) < 0.06
    assert stats.kstest(added / added.std(), "norm").pvalue > 1e-3
    assert not AddNoise()({"audio": np.zeros(9, np.float32)}, generator())["audio"].any()
    np.testing.assert_array_equal(AddNoise(probability=0.0)({"audio": samples}, generator())["audio"], samples)


def test_normalised_features_have_mean_zero_and_deviation_one():
    features = noise((50, 4), scale=3.0) + np.float32([0, 5, -20, 1])
    features[:, 3] = 1  # no deviation at all
    found = NormaliseFeatures()({"audio": features}, generator())["audio"]
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), [1, 1, 1, 0], atol=1e-5)
    fixed = NormaliseFeatures(mean=(1.0, 2.0, 3.0, 4.0), std=(2.0, 2.0, 4.0, 4.0))
    wanted = (features - [1, 2, 3, 4]) / [2, 2, 4, 4]
    np.testing.assert_allclose(fixed({"audio": features}, generator())["audio"], wanted, atol=1e-5)
    for how in ({"mean": (1.0,)}, {"std": (1.0,)}, {"mean": (1.0,), "std": (0.0,)}):
        with pytest.raises(UserError, match=r"NormaliseFeatures\.std"):
            NormaliseFeatures(**how)
    with pytest.raises(ValueError, match="has 2 means, and a frame 4 features"):
        NormaliseFeatures(mean=(1.0, 2.0), std=(1.0, 2.0))({"audio": features}, generator())


def runs(marked):
    """How many stretches of True there are."""
    return int(np.diff(np.concatenate([[0], marked.astype(int)])).clip(0).sum())


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(1, 60),
    bands=st.integers(1, 20),
    masks=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    widths=st.tuples(st.integers(0, 30), st.integers(0, 90)),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_masks_are_no_more_and_no_wider_than_allowed(frames, bands, masks, widths, share, seed):
    augment = SpecAugment(
        band_masks=masks[0], band_width=widths[0], frame_masks=masks[1], frame_width=widths[1], frame_share=share
    )
    features = np.ones((frames, bands), np.float32)
    found = augment({"audio": features}, generator(seed))["audio"]
    assert (features == 1).all()
    assert np.isin(found, (0, 1)).all()
    hidden_frames, hidden_bands = (found == 0).all(1), (found == 0).all(0)
    if not hidden_bands.all() and not hidden_frames.all():
        np.testing.assert_array_equal(found == 0, hidden_frames[:, None] | hidden_bands)
        assert runs(hidden_bands) <= masks[0]
        assert runs(hidden_frames) <= masks[1]
        assert hidden_bands.sum() <= masks[0] * min(widths[0], bands)
        assert hidden_frames.sum() <= masks[1] * min(widths[1], share * frames)


def test_mask_widths_and_places_are_uniform():
    augment, rng = SpecAugment(band_masks=0, frame_masks=1, frame_width=5), generator()
    features, widths, starts = np.ones((20, 2), np.float32), [], []
    for _ in range(3000):
        hidden = augment({"audio": features}, rng)["audio"][:, 0] == 0
        widths.append(hidden.sum())
        if widths[-1] == 5:
            starts.append(hidden.argmax())
    assert stats.chisquare(np.bincount(widths, minlength=6)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(starts, minlength=16)).pvalue > 1e-3


@settings(max_examples=80, deadline=None)
@given(frames=st.integers(1, 200), reach=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_the_time_warp_moves_one_point_and_stretches_both_sides_evenly(frames, reach, seed):
    warp = SpecAugment(time_warp=reach, band_masks=0, frame_masks=0)
    times = np.arange(frames, dtype=np.float32)[:, None]  # so that each frame of the result tells where it came from
    source = warp({"audio": times}, generator(seed))["audio"][:, 0].astype(float)
    if frames < 3:
        np.testing.assert_array_equal(source, times[:, 0])
        return
    assert source[0] == 0
    assert abs(source[-1] - (frames - 1)) < 1e-3
    slopes = np.diff(source)
    assert (slopes >= 0).all()
    assert abs(source - times[:, 0]).max() <= min(reach, (frames - 1) / 2) + 1e-3
    changes = np.flatnonzero(abs(np.diff(slopes)) > 1e-3)
    assert len(changes) == 0 or np.ptp(changes) <= 1  # the corner lies between two frames, so it shows at one or two


def test_the_librispeech_policies_are_those_of_table_1():
    basic, double = SpecAugment.librispeech_basic(), SpecAugment.librispeech_double()
    for policy, masks in ((basic, 1), (double, 2)):
        assert (policy.time_warp, policy.band_width, policy.frame_width, policy.frame_share) == (80, 27, 100, 1.0)
        assert (policy.band_masks, policy.frame_masks) == (masks, masks)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (DecodeAudio(rate=16000), None),
        (CropOrPadAudio(length=700, place="random"), (900,)),
        (AddNoise(), (900,)),
        (LogMel(rate=8000, num_mels=20), (900,)),
        (NormaliseFeatures(), (90, 20)),
        (SpecAugment(time_warp=10, band_width=5, frame_width=10), (90, 20)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_example_depends_on_its_generator_alone_and_is_not_changed(transform, shape):
    value = wav(noise(900)) if shape is None else noise(shape)
    if shape is not None:
        value.flags.writeable = False
    made = [
        transform({"audio": value, "label": 1}, generator(7, 1, index))["audio"].tobytes()
        for index in (0, 0, *range(1, 8))
    ]
    if shape is not None:
        np.testing.assert_array_equal(value, noise(shape))
    assert made[0] == made[1]
    fixed = isinstance(transform, DecodeAudio | LogMel | NormaliseFeatures)
    assert (len(set(made)) == 1) == fixed
