"""Text to ids and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, SupportsIndex

import numpy as np

from axrepro.errors import UserError


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

    @abstractmethod
    def encode(self, text: bytes | str) -> np.ndarray:
        """int32[N]: the ids of a text, without special ones at either end.

        Raises:
          UnicodeDecodeError: if the text is bytes that are not UTF-8, and the vocabulary needs characters.
        """

    @abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids; special ones are left out wherever they stand."""


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """Every byte is a token: 0 padding, 1 end of document, 2 unknown, then byte b as b + 3.

    The ids of SeqIO's byte vocabulary. Any bytes are allowed; `decode` writes U+FFFD for those that are not UTF-8.
    """

    name = "bytes"
    size = 259
    pad_id = 0
    eos_id = 1
    first_id = 3

    def encode(self, text: bytes | str) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32) + self.first_id

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        raw = ids[(ids >= self.first_id) & (ids < self.size)] - self.first_id
        return raw.astype(np.uint8).tobytes().decode(errors="replace")


@lru_cache(maxsize=8)
def _processor(path: str):
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"the vocabulary {path} needs the package sentencepiece, which is missing: pip install axrepro[text]"
        ) from None
    if not Path(path).is_file():
        raise UserError(f"there is no SentencePiece model at {path}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
        size = processor.vocab_size()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is no SentencePiece model ({error})") from None
    if processor.eos_id() < 0:
        raise UserError(
            f"the SentencePiece model {path} has no end-of-sentence id among its {size}, which documents end with; "
            "train it with eos_id set"
        )
    return processor


@dataclass(frozen=True)
class SentencePiece(Vocabulary):
    """The ids of a SentencePiece model, special ones included.

    A model without a padding id (the trainer's default) pads with its end id: padding has segment id 0 and is never
    read. A model without an end id is refused. Needs the extra `text`.

    Attributes:
      path: the `.model` file; it is read when the first id or the size is asked for.
    """

    path: str

    @property
    def name(self) -> str:
        return f"sentencepiece:{self.path}"

    @property
    def size(self) -> int:
        return _processor(self.path).vocab_size()

    @property
    def pad_id(self) -> int:
        pad = _processor(self.path).pad_id()
        return pad if pad >= 0 else self.eos_id

    @property
    def eos_id(self) -> int:
        return _processor(self.path).eos_id()

    def encode(self, text: bytes | str) -> np.ndarray:
        text = text.decode() if isinstance(text, bytes) else text
        return np.asarray(_processor(self.path).encode(text), np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        processor = _processor(self.path)
        return processor.decode([i for i in map(int, ids) if not processor.is_control(i)])
