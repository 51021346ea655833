"""Text to ids and back."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import numpy as np

from axrepro.errors import UserError, nearest, require


class Vocabulary(ABC):
    """A frozen dataclass that maps text to ids in [0, size)."""

    first_id: ClassVar[int] = 0  # the lowest id that `encode` gives: a corpus stores ids relative to it, in fewer bytes

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ids, special ones included."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """Fills rows up; such positions have segment id 0."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Ends a document, and stands before its first token as input."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of what gives ids their meaning: ids stored under another one are those of another vocabulary."""

    @abstractmethod
    def encode(self, text: bytes | str) -> np.ndarray:
        """int32[N]: the ids of a text, without special ones at either end.

        Raises:
          UnicodeDecodeError: if the text is bytes that are not UTF-8, and the vocabulary needs characters.
        """

    @abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids; special ones are left out wherever they stand."""


def _require_extra_ids(vocabulary) -> None:
    count = vocabulary.extra_ids
    allowed = isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**20
    require(vocabulary, "extra_ids", allowed, "a whole number from 0 to 1048575")


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """Every byte is a token: 0 padding, 1 end of document, 2 unknown, then byte b as b + 3.

    The ids of SeqIO's byte vocabulary. Any bytes are allowed; `decode` writes U+FFFD for those that are not UTF-8.

    Attributes:
      extra_ids: ids above those of the bytes, which no text gives: the sentinels of denoising.
    """

    extra_ids: int = 0
    name = "bytes"
    pad_id = 0
    eos_id = 1
    first_id = 3
    fingerprint = hashlib.sha256(b"0 padding, 1 end, 2 unknown, byte b at b + 3").hexdigest()

    def __post_init__(self):
        _require_extra_ids(self)

    @property
    def size(self) -> int:
        return self.first_id + 256 + self.extra_ids

    def encode(self, text: bytes | str) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32) + self.first_id

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        raw = ids[(ids >= self.first_id) & (ids < self.first_id + 256)] - self.first_id
        return raw.astype(np.uint8).tobytes().decode(errors="replace")


def _read(path: str | Path, what: str) -> bytes:
    if not Path(path).is_file():
        raise UserError(f"there is no {what} at {path}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None


@lru_cache(maxsize=8)
def _processor(path: str) -> tuple[Any, str]:
    """The SentencePiece model of a file, and the digest of the file."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"the vocabulary {path} needs the package sentencepiece, which is missing: pip install axrepro[text]"
        ) from None
    content = _read(path, "SentencePiece model")
    try:
        make: Any = sentencepiece.SentencePieceProcessor  # whose type some versions do not tell
        processor = make(model_proto=content)
        size = processor.vocab_size()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no SentencePiece model ({error})") from None
    if not size:  # no content at all is a model without pieces
        raise UserError(f"{path} is no SentencePiece model (it has no pieces)")
    if processor.eos_id() < 0:
        raise UserError(
            f"the SentencePiece model {path} has no end-of-sentence id among its {size}, which documents end with; "
            "train it with eos_id set"
        )
    return processor, hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class SentencePiece(Vocabulary):
    """The ids of a SentencePiece model, special ones included.

    A model without a padding id (the trainer's default) pads with its end id: padding has segment id 0 and is never
    read. A model without an end id is refused. Needs the extra `text`.

    Attributes:
      path: the `.model` file; it is read when the first id or the size is asked for.
      extra_ids: ids above those of the model, which no text gives: the sentinels of denoising, for a model that has
        none itself (the published one of T5: 100).
    """

    path: str
    extra_ids: int = 0

    def __post_init__(self):
        _require_extra_ids(self)

    @property
    def name(self) -> str:
        return f"sentencepiece:{self.path}"

    @property
    def fingerprint(self) -> str:
        return _processor(self.path)[1]

    @property
    def size(self) -> int:
        return _processor(self.path)[0].vocab_size() + self.extra_ids

    @property
    def pad_id(self) -> int:
        pad = _processor(self.path)[0].pad_id()
        return pad if pad >= 0 else self.eos_id

    @property
    def eos_id(self) -> int:
        return _processor(self.path)[0].eos_id()

    def encode(self, text: bytes | str) -> np.ndarray:
        text = text.decode() if isinstance(text, bytes) else text
        return np.asarray(_processor(self.path)[0].encode(text), np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        processor = _processor(self.path)[0]
        size = processor.vocab_size()
        return processor.decode([i for i in map(int, ids) if 0 <= i < size and not processor.is_control(i)])


_HUB = "hf://"


def _fetch(path: str) -> tuple[Path, Path | None]:
    """The tokenizer.json that a path names, on disk, and the tokenizer_config.json beside it.

    Only a path that begins with hf:// is looked up on the Hugging Face hub, or in its cache on this machine.
    """
    if not path.startswith(_HUB):
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        beside = file.with_name("tokenizer_config.json")
        return file, beside if beside.is_file() else None
    repository, _, revision = path.removeprefix(_HUB).partition("@")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    def get(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision or None))

    try:
        file = get("tokenizer.json")
        try:
            return file, get("tokenizer_config.json")
        except EntryNotFoundError:
            return file, None
    except HFValidationError:
        raise UserError(
            f"{path} names no repository of the hub; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        ) from None
    except Exception as error:  # of the hub, of HTTP, of the network
        raise UserError(
            f"cannot get the tokenizer {path} from the Hugging Face hub ({type(error).__name__}); check the name and "
            "the network, or give the path of a tokenizer.json on this machine"
        ) from None


class _Tokenizer(NamedTuple):
    """What a tokenizer.json holds.

    Attributes:
      library: the `tokenizers.Tokenizer`; calls from several threads do not change it.
      size: the highest id, plus one: there may be gaps.   fingerprint: of the file.
      roles: the texts of the special tokens "eos" and "pad", where the file beside it names them.
    """

    library: Any
    size: int
    fingerprint: str
    roles: dict[str, str | None]


@lru_cache(maxsize=8)
def _tokenizer(path: str, parse_special: bool) -> _Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"the vocabulary {path} needs the package tokenizers, which is missing: pip install axrepro[data]"
        ) from None
    file, config_file = _fetch(path)
    content = _read(file, "tokenizer.json" + ("" if file.suffix == ".json" else " (hf://OWNER/NAME fetches one)"))
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file} is no tokenizer.json ({' '.join(str(error).split())[:200]})") from None
    written = _read(config_file, "file") if config_file else b"{}"
    try:
        config = json.loads(written)
        # a special token is a string, or written out with its options
        roles = {role: config.get(f"{role}_token") for role in ("eos", "pad")}
        roles = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{config_file} is no tokenizer_config.json ({error})") from None
    # a file may say that texts are cut or padded, as its last user wanted them
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    return _Tokenizer(tokenizer, size, hashlib.sha256(content).hexdigest(), roles)


@dataclass(frozen=True)
class HuggingFace(Vocabulary):
    """The ids of a `tokenizer.json`, the file of the Hugging Face tokenizers, special ones included.

    Attributes:
      path: the file, or the folder that holds it, read when the first id or the size is asked for. A name on the hub is
        written hf://OWNER/NAME or hf://OWNER/NAME@REVISION; nothing else is ever looked up there.
      eos, pad: the texts of these tokens. None: what the `tokenizer_config.json` beside the file says, and where it
        has no padding, the end token: padding has segment id 0 and is never read.
      parse_special: whether the text of a special token, such as <|im_end|>, becomes its id, as chat templates need it;
        False: it is text like any other, as documents of unknown origin need it.
    """

    path: str
    eos: str | None = None
    pad: str | None = None
    parse_special: bool = True

    @property
    def _loaded(self) -> _Tokenizer:
        return _tokenizer(self.path, self.parse_special)

    def _special(self, role: str) -> int | None:
        token = getattr(self, role) or self._loaded.roles[role]
        if token is None:
            return None
        index = self._loaded.library.token_to_id(token)
        if index is None:
            raise UserError(f"{self.path} has no token {token!r}, its {role}; {nearest(token, self._specials())}")
        return index

    def _specials(self) -> list[str]:
        added = self._loaded.library.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    @property
    def name(self) -> str:
        return f"huggingface:{self.path}"

    @property
    def fingerprint(self) -> str:
        return self._loaded.fingerprint

    @property
    def size(self) -> int:
        return self._loaded.size

    @property
    def pad_id(self) -> int:
        pad = self._special("pad")
        return self.eos_id if pad is None else pad

    @property
    def eos_id(self) -> int:
        eos = self._special("eos")
        if eos is None:
            known = ", ".join(self._specials()) or "none"
            raise UserError(
                f"{self.path} does not say which token ends a document; set eos (its special tokens: {known[:300]})"
            )
        return eos

    def encode(self, text: bytes | str) -> np.ndarray:
        text = text.decode() if isinstance(text, bytes) else text
        return np.asarray(self._loaded.library.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._loaded.library.decode([i for i in map(int, ids) if i >= 0], skip_special_tokens=True)
