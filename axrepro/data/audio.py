"""Sound: files and archives of it, and transforms from their bytes to samples and to log-mel features.

Samples are float32[N] in [-1, 1] from `DecodeAudio` on; features are float32[T, M], a row for each frame in time.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from axrepro.data.base import Split
from axrepro.data.fields import FieldTransform, take
from axrepro.data.records import BadRecord, Example
from axrepro.data.sources import Files, Pieces, held_out
from axrepro.errors import (
    UserError,
    is_number,
    nearest,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_sizes,
)

_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")


@dataclass(frozen=True)
class AudioFiles(Files):
    """Sound files, each a record, and those in .tar, .tar.gz, .tar.xz, .tar.bz2 and .zip archives; see `Files` for the
    other fields.

    Records: "audio" (bytes), "name", and a field for each named group of `name_fields`. Archives are not unpacked to
    disk: members of a .zip and of a plain .tar are read where they lie; a packed .tar is held in memory, so for a large
    one repack it. What is held out goes by the path of the file or archive below the first wildcard, and that of the
    member in it.

    Attributes:
      name_fields: a regular expression that must match the end of every path, from the start of a folder's or file's
        name on, such as `(?P<label>\\d)_(?P<speaker>\\w+)_(?P<index>\\d+)\\.wav` or `(?P<label>\\w+)/[^/]+\\.wav`.
        All groups become text but "label".
      labels: the names that "label" can be, which becomes its place among them; None: it is a whole number itself.
      eval_names: a regular expression; files whose path it finds a match in are the eval split, and the others are all
        for training. It can tell apart the members of one archive, which `eval_pattern` cannot.
    """

    name_fields: str | None = None
    labels: tuple[str, ...] | None = None
    eval_names: str | None = None

    _remedy = "give eval_pattern or eval_names (what to evaluate on), or change the holdout (0: no eval)"

    def __post_init__(self):
        super().__post_init__()
        for name in ("name_fields", "eval_names"):
            if getattr(self, name) is not None:
                try:
                    re.compile(getattr(self, name))
                except re.error as error:
                    require(self, name, False, f"a regular expression: {error}")
        both = self.eval_names is not None and self.eval_pattern is not None
        require(self, "eval_names", not both, "None where eval_pattern is given")
        require(self, "labels", self.labels is None or len(set(self.labels)) == len(self.labels), "different names")

    def open(self, split: Split) -> Pieces:
        files, holdout = self.files(split)
        counts: dict[Split, int] = {"train": 0, "eval": 0}
        paths, pieces, unpacked, names, fields = [], [], {}, [], []
        for path, key in files.items():
            members, whole = _members(path)
            kept = []
            for member, *piece in members:
                where = f"{key}/{member}" if member else key
                if self.eval_names is not None:
                    here: Split = "eval" if re.search(self.eval_names, where) else "train"
                elif self.eval_pattern is not None:
                    here = split
                else:
                    here = "eval" if held_out(where, holdout) else "train"
                counts[here] += 1
                if here == split:
                    kept.append(piece)
                    names.append(f"{path}:{member}" if member else path)
                    fields.append(self._fields(where, names[-1]))
            if kept:
                paths.append(path)
                pieces.append(np.array(kept, np.int64))
                if whole is not None:
                    unpacked[path] = whole
        if self.eval_names is not None and sum(counts.values()) and not counts[split]:
            found = "none" if split == "eval" else "all"
            raise UserError(f"AudioFiles {self.pattern!r}: eval_names={self.eval_names!r} matches {found} of the files")
        self.check(counts, split, 0 if self.eval_names is not None else holdout)
        return _Sounds(paths, pieces, unpacked, names, fields)

    def _fields(self, path: str, name: str) -> dict[str, str | int]:
        """What the path tells of a record."""
        if self.name_fields is None:
            return {}
        match = re.search(rf"(?:^|/)(?:{self.name_fields})\Z", path)
        if match is None:
            raise UserError(f"{name} is not named as name_fields={self.name_fields!r} has it; narrow the pattern")
        fields = match.groupdict()
        label = fields.get("label")
        if label is None:
            return fields
        if self.labels is None:
            if not label.isdecimal():
                raise UserError(f"{name} has the label {label!r}, which is no whole number; list the names in labels")
            return fields | {"label": int(label)}
        if label not in self.labels:
            raise UserError(
                f"{name} has the label {label!r}, which labels does not list; {nearest(label, self.labels)}"
            )
        return fields | {"label": self.labels.index(label)}


_DEFLATED, _STORED = 1, 0  # how a piece is packed, in place of its number


def _members(path: str) -> tuple[list[tuple[str, int, int, int]], bytes | None]:
    """Name ("": the file itself), packing, start and size of each sound in a file; and the bytes of a packed tar."""
    try:
        if path.lower().endswith(_TARS):
            return _tar_members(path)
        if path.lower().endswith(".zip"):
            return _zip_members(path), None
        with open(path, "rb") as file:
            return [("", _STORED, 0, file.seek(0, io.SEEK_END))], None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _is_sound(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def _tar_members(path: str) -> tuple[list[tuple[str, int, int, int]], bytes | None]:
    unpack = {"gz": gzip.open, "tgz": gzip.open, "xz": lzma.open, "txz": lzma.open, "bz2": bz2.open}
    whole = None
    if (suffix := path.lower().rsplit(".", 1)[-1]) in unpack:
        with unpack[suffix](path, "rb") as file:
            whole = file.read()
    with tarfile.open(path, "r:") if whole is None else tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
        found = [
            (member.name, _STORED, member.offset_data, member.size)
            for member in archive
            if member.isreg() and not member.issparse() and _is_sound(member.name)
        ]
    return found, whole


def _zip_members(path: str) -> list[tuple[str, int, int, int]]:
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if not _is_sound(member.filename):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                raise UserError(f"{path}:{member.filename} is encrypted, or packed by another way than deflate")
            file.seek(member.header_offset + 26)  # of the local header's 30 bytes the last four are two lengths
            start = member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
            packing = _STORED if member.compress_type == zipfile.ZIP_STORED else _DEFLATED
            found.append((member.filename, packing, start, member.compress_size))
    return found


class _Sounds(Pieces):
    def __init__(self, paths: list[str], pieces: list[np.ndarray], unpacked: dict[str, bytes], names, fields):
        super().__init__(paths, pieces, unpacked)
        self._names, self._fields = names, fields

    def name(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Example:
        data = self.read(index)
        if self._pieces[index, 0] == _DEFLATED:
            try:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise BadRecord(f"cannot unpack {self.name(index)}: {error}") from None
        return {"audio": data, **self._fields[index], "name": self.name(index)}


@dataclass(frozen=True, kw_only=True)
class DecodeAudio(FieldTransform):
    """The bytes of a sound file to float32[N], the mean of its channels.

    Attributes:
      rate: samples per second; sound of another rate is resampled (soxr, high quality).
    """

    rate: int
    field: str = "audio"

    def __post_init__(self):
        require_sizes(self, "rate")

    def apply(self, value: Any, rng: np.random.Generator) -> Float32[np.ndarray, " N"]:
        try:
            import soundfile
            import soxr
        except ImportError as error:
            raise UserError(
                f"sound needs the package {error.name}, which is missing: pip install axrepro[data]"
            ) from None
        if not isinstance(value, bytes):
            raise ValueError(f"the field {self.field!r} is {type(value).__name__}, not the bytes of a sound file")
        if not value:
            raise ValueError("the sound file is empty (0 bytes)")
        if value[:4] == b"RIFF" and value[4:8] != b"\xff" * 4:  # the decoder would take a part for the whole
            missing = int.from_bytes(value[4:8], "little") + 8 - len(value)
            if missing > 1:  # some writers count a byte of padding that they leave out
                raise ValueError(f"the sound file is cut off: {missing} bytes are missing")
        try:
            with soundfile.SoundFile(io.BytesIO(value)) as file:
                samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
        except soundfile.LibsndfileError as error:
            raise ValueError(f"cannot decode the sound file: {error.error_string}") from None
        if not len(samples):
            raise ValueError("the sound file has no samples")
        samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)
        if not np.isfinite(samples).all():
            raise ValueError("the sound file has samples that are no finite numbers")
        return samples if rate == self.rate else soxr.resample(samples, rate, self.rate, quality="HQ")


@dataclass(frozen=True, kw_only=True)
class CropOrPadAudio:
    """`length` samples, or frames of features: longer ones are cut, and shorter ones filled up with zeros.

    Attributes:
      place: of what is kept of a longer one, and of a shorter one among the zeros.
      mask_field: gets bool[length], True where there are no zeros filled in; None: nothing does.
    """

    length: int
    place: Literal["start", "middle", "random"] = "start"
    field: str = "audio"
    mask_field: str | None = None

    def __post_init__(self):
        require_sizes(self, "length")
        require_choice(self, "place", Literal["start", "middle", "random"])

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        value = take(example, self.field)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"the field {self.field!r} is {type(value).__name__}, not an array; decode it before")
        spare = abs(len(value) - self.length)
        start = {"start": 0, "middle": spare // 2}.get(self.place)
        if start is None:
            start = int(rng.integers(spare + 1))
        kept = min(len(value), self.length)
        if len(value) >= self.length:
            out, start = value[start : start + self.length], 0
        else:
            out = np.zeros((self.length, *value.shape[1:]), value.dtype)
            out[start : start + kept] = value
        if self.mask_field is None:
            return {**example, self.field: out}
        mask = np.zeros(self.length, bool)
        mask[start : start + kept] = True
        return {**example, self.field: out, self.mask_field: mask}


@dataclass(frozen=True, kw_only=True)
class LogMel(FieldTransform):
    """Samples float32[N] to the logarithm of mel spectra, float32[T, num_mels].

    Frame t holds the `window_size` samples from `hop` * t - P on, of which T = 1 + (N + 2 P - window_size) // hop are
    whole; P is 0, or window_size // 2 with padding, so that frame t lies around sample `hop` * t.

    Attributes:
      rate: samples per second, as `DecodeAudio` gave them.
      num_mels: triangular filters, evenly spaced in mel from `low` to `high` Hz (None: rate / 2).
      fft_size: the samples of a frame are filled up with zeros to these; None: `window_size`.
      padding: at both ends of the sound; "reflect" mirrors it, and needs more than P samples.
      scale: "slaney": linear below 1 kHz and logarithmic above; "htk": 2595 log10(1 + f / 700).
      norm: "slaney": filters have equal areas; "none": equal peaks, of 1.
      power: of the magnitudes: 2 for energies, 1 for themselves.
      floor: smaller values count as this one.
      log: base e, or 10.
    """

    rate: int
    num_mels: int = 80
    window_size: int = 400
    hop: int = 160
    fft_size: int | None = None
    window: Literal["hann", "hamming", "blackman"] = "hann"
    padding: Literal["none", "zeros", "reflect"] = "zeros"
    scale: Literal["slaney", "htk"] = "slaney"
    norm: Literal["slaney", "none"] = "slaney"
    low: float = 0.0
    high: float | None = None
    power: float = 2.0
    floor: float = 1e-10
    log: Literal["e", "10"] = "e"
    field: str = "audio"

    def __post_init__(self):
        require_sizes(self, "rate", "num_mels", "window_size", "hop", "fft_size")
        require_choice(self, "window", Literal["hann", "hamming", "blackman"])
        require_choice(self, "padding", Literal["none", "zeros", "reflect"])
        require_choice(self, "scale", Literal["slaney", "htk"])
        require_choice(self, "norm", Literal["slaney", "none"])
        require_choice(self, "log", Literal["e", "10"])
        require_not_negative(self, "low")
        require_positive(self, "high", "power", "floor")
        top = self.rate / 2 if self.high is None else self.high
        require(
            self, "high", self.low < top <= self.rate / 2, f"a frequency above low, up to rate / 2 = {self.rate / 2}"
        )
        wide = self.fft_size is None or self.fft_size >= self.window_size
        require(self, "fft_size", wide, f"a number of samples from window_size={self.window_size} on")

    def apply(self, value: Any, rng: np.random.Generator) -> Float32[np.ndarray, "T M"]:
        import scipy.fft

        samples = _float_array(value, 1, self.field, "DecodeAudio")
        beyond = 0 if self.padding == "none" else self.window_size // 2
        needed = {"none": self.window_size, "zeros": 1, "reflect": beyond + 1}[self.padding]
        if len(samples) < max(needed, self.window_size - 2 * beyond):
            raise ValueError(f"the sound has {len(samples)} samples, and LogMel needs {needed}; pad it or leave it out")
        samples = samples.astype(np.float32, copy=False)
        if beyond:
            samples = np.pad(samples, beyond, mode="constant" if self.padding == "zeros" else "reflect")
        window, filters = _tables(self)
        frames = np.lib.stride_tricks.sliding_window_view(samples, self.window_size)[:: self.hop]
        out = np.empty((len(frames), self.num_mels), np.float32)
        for start in range(0, len(frames), _FRAMES):
            some = slice(start, start + _FRAMES)
            spectrum = scipy.fft.rfft(frames[some] * window, self.fft_size or self.window_size)  # NumPy's is slower
            energy = spectrum.real**2
            energy += spectrum.imag**2
            if self.power != 2:
                energy **= self.power / 2
            np.matmul(energy, filters, out=out[some])
        np.maximum(out, np.float32(self.floor), out=out)
        return np.log(out, out=out) if self.log == "e" else np.log10(out, out=out)


_FRAMES = 128  # at once, which the processor's cache can hold


@lru_cache(maxsize=16)
def _tables(mel: LogMel) -> tuple[Float32[np.ndarray, " W"], Float32[np.ndarray, "F M"]]:
    """The window, and the filters of each frequency."""
    try:
        from librosa import filters
    except ImportError as error:
        raise UserError(f"LogMel needs the package {error.name}, which is missing: pip install axrepro[data]") from None
    with warnings.catch_warnings():  # of filters between two frequencies: told below
        warnings.simplefilter("ignore")
        table = filters.mel(
            sr=mel.rate,
            n_fft=mel.fft_size or mel.window_size,
            n_mels=mel.num_mels,
            fmin=mel.low,
            fmax=mel.high,
            htk=mel.scale == "htk",
            norm="slaney" if mel.norm == "slaney" else None,
        )
    empty = int((table.max(1) == 0).sum())
    require(mel, "num_mels", not empty, f"fewer filters: {empty} hold no frequency of the spectrum (or raise fft_size)")
    return filters.get_window(mel.window, mel.window_size).astype(np.float32), np.ascontiguousarray(table.T)


def _float_array(value: Any, rank: int, field: str, remedy: str) -> Float[np.ndarray, "..."]:
    if not isinstance(value, np.ndarray) or value.ndim != rank or not np.issubdtype(value.dtype, np.floating):
        held = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"the field {field!r} is {held}, not a float array of rank {rank}; put {remedy} before")
    return value


@dataclass(frozen=True, kw_only=True)
class AddNoise(FieldTransform):
    """Gaussian white noise added to samples, at a signal-to-noise ratio: 10 log10 of the ratio of their mean squares.

    Silence stays silent.

    Attributes:
      decibels: smallest and largest ratio; it is uniform between them.
      probability: how often.
    """

    decibels: tuple[float, float] = (10.0, 30.0)
    probability: float = 1.0
    field: str = "audio"

    def __post_init__(self):
        low, high = self.decibels
        require(
            self, "decibels", is_number(low) and is_number(high) and low <= high, "two numbers, smallest <= largest"
        )
        require(self, "probability", is_number(self.probability) and 0 <= self.probability <= 1, "a number in [0, 1]")

    def apply(self, value: Any, rng: np.random.Generator) -> Float[np.ndarray, " N"]:
        samples = _float_array(value, 1, self.field, "DecodeAudio")
        if rng.random() >= self.probability:
            return samples
        ratio = 10 ** (rng.uniform(*self.decibels) / 10)
        noise = rng.standard_normal(samples.shape, np.float32)
        noise *= np.float32(np.sqrt(np.vdot(samples, samples) / (ratio * np.vdot(noise, noise))))
        noise += samples
        return noise


@dataclass(frozen=True, kw_only=True)
class NormaliseFeatures(FieldTransform):
    """(features - mean) / std for each of the M columns of float32[T, M].

    Attributes:
      mean, std: one for each column, or one for all; None: the example's own.
      eps: the example's own deviation counts as this if it is smaller.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eps: float = 1e-5
    field: str = "audio"

    def __post_init__(self):
        require(self, "mean", self.mean is None or all(map(is_number, self.mean)), "None or numbers")
        fits = (self.std is None) == (self.mean is None) and len(self.std or ()) == len(self.mean or ())
        fits = fits and all(is_number(value) and value > 0 for value in self.std or ())
        require(self, "std", fits, "None where mean is None, else as many numbers above 0 as mean has")
        require_positive(self, "eps")

    def apply(self, value: Any, rng: np.random.Generator) -> Float32[np.ndarray, "T M"]:
        features = _float_array(value, 2, self.field, "LogMel")
        if self.mean is None:
            out = features - features.mean(0)
            out /= np.maximum(np.sqrt(np.mean(out * out, 0)), np.float32(self.eps))
            return out
        if len(self.mean) not in (1, features.shape[1]):
            raise ValueError(f"NormaliseFeatures has {len(self.mean)} means, and a frame {features.shape[1]} features")
        out = features - np.array(self.mean, np.float32)
        out /= np.array(self.std, np.float32)
        return out


@dataclass(frozen=True, kw_only=True)
class SpecAugment(FieldTransform):
    """Frames and bands of features float32[T, M] set to 0, and time stretched, in training.

    SpecAugment (arXiv:1904.08779), Sec. 2. A mask of bands is f ~ U{0 ... F} wide and begins at U{0 ... M - f}; one of
    frames is t ~ U{0 ... min(T, p * frames)} wide and begins at U{0 ... frames - t}. (The paper leaves the last place
    out, so that the last frame would never be masked.) 0 is the mean of features that `NormaliseFeatures` has seen. All
    frames count as sound, so padding comes afterwards.

    Departure: the time warp is piecewise linear, with the ends fixed, between a point and where it moves; the authors
    take a spline through the same points. A sound of no more than 2 W frames is warped by less than half its length.

    Attributes:
      time_warp: W, the most frames a point moves by; 0: none.
      band_masks, band_width: how many masks of bands, and F.
      frame_masks, frame_width: how many masks of frames, and T.
      frame_share: p, the largest share of the frames that one mask covers.
    """

    time_warp: int = 0
    band_masks: int = 2
    band_width: int = 27
    frame_masks: int = 2
    frame_width: int = 100
    frame_share: float = 1.0
    field: str = "audio"

    def __post_init__(self):
        require_not_negative(self, "time_warp", "band_masks", "band_width", "frame_masks", "frame_width")
        require(self, "frame_share", is_number(self.frame_share) and 0 <= self.frame_share <= 1, "a share in [0, 1]")

    @classmethod
    def librispeech_basic(cls) -> "SpecAugment":
        """LB of Table 1."""
        return cls(time_warp=80, band_masks=1, frame_masks=1)

    @classmethod
    def librispeech_double(cls) -> "SpecAugment":
        """LD of Table 1."""
        return cls(time_warp=80)

    def apply(self, value: Any, rng: np.random.Generator) -> Float[np.ndarray, "T M"]:
        features = _float_array(value, 2, self.field, "LogMel")
        out = _warped(features, self.time_warp, rng) if self.time_warp else features.copy()
        frames, bands = out.shape
        widest = (min(self.band_width, bands), min(self.frame_width, int(self.frame_share * frames), frames))
        for _ in range(self.band_masks):
            start, stop = _mask(bands, widest[0], rng)
            out[:, start:stop] = 0
        for _ in range(self.frame_masks):
            start, stop = _mask(frames, widest[1], rng)
            out[start:stop] = 0
        return out


def _mask(length: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(widest + 1))
    start = int(rng.integers(length - width + 1))
    return start, start + width


def _warped(features: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    last = len(features) - 1
    reach = min(reach, last / 2)
    if reach < 1:
        return features.copy()
    point, shift = rng.uniform(reach, last - reach), rng.uniform(-reach, reach)
    source = np.interp(np.arange(last + 1), [0, point + shift, last], [0, point, last])
    before = np.minimum(source.astype(np.intp), last - 1)
    share = (source - before).astype(features.dtype)[:, None]
    return features[before] * (1 - share) + features[before + 1] * share
