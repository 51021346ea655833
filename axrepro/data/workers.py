"""Rows made ahead of time by worker processes, which Grain runs and hands over in order."""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from absl import flags

from axrepro.data.base import Cursor
from axrepro.errors import UserError


class _Elements:
    """For Grain: element b holds the rows of a process in the b-th batch from where the cursor stood."""

    def __init__(self, cursor: Cursor, ranges: Sequence[tuple[int, int]]):
        self._cursor, self._ranges, self._at = cursor, ranges, 0

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, batch: SupportsIndex) -> dict[str, np.ndarray]:
        try:
            while self._at < operator.index(batch):
                self._cursor.advance()
                self._at += 1
            parts = [self._cursor.rows(*part) for part in self._ranges]
        except Exception as error:  # it belongs to the run: Grain would tell of it in its own words
            of_user = isinstance(error, UserError)
            return {"error": _pack([of_user, str(error) if of_user else f"{type(error).__name__}: {error}"])}
        arrays = {f"{i}/{name}": array for i, part in enumerate(parts) for name, array in part.items()}
        return arrays | {"bad": _pack(dict(self._cursor.bad_records))}


def _pack(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _unpack(array: np.ndarray):
    return json.loads(np.asarray(array).tobytes())


class Workers:
    """Processes that each make every n-th batch from the cursor's on.

    Attributes:
      bad_records: what was wrong with each record that was left out so far.
    """

    def __init__(self, cursor: Cursor, ranges: Sequence[tuple[int, int]], number: int):
        """
        Args:
          ranges: the rows (start, stop) of each batch that are asked for.   number: of processes.
        """
        self._ranges, self._number = ranges, number
        self.bad_records: dict[str, str] = {}
        self._iterator = None
        self._cursor = cursor

    def restart(self, cursor: Cursor) -> None:
        """Goes on from where the cursor stands now."""
        self.close()
        self._cursor = cursor

    def load(self) -> Callable[[int, int], Mapping[str, np.ndarray]]:
        """The rows of the next batch, by range.

        Raises:
          UserError: what a worker raised.
          RuntimeError: any other error of a worker.
        """
        if self._iterator is None:
            self._iterator = self._start()
        element = next(self._iterator)
        if "error" in element:
            of_user, text = _unpack(element["error"])
            raise UserError(text) if of_user else RuntimeError(f"a data worker failed: {text}")
        self.bad_records |= _unpack(element.pop("bad"))
        parts: dict[tuple[int, int], dict[str, np.ndarray]] = {part: {} for part in self._ranges}
        for name, array in element.items():
            number, _, name = name.partition("/")
            # a copy: a jax array on CPU would keep the worker's shared memory, of which there is little
            parts[self._ranges[int(number)]][name] = np.array(array)
        return lambda start, stop: parts[start, stop]

    def _start(self):
        try:
            import grain
        except ImportError:
            raise UserError(
                f"data.workers={self._number} needs the package grain, which is missing: pip install axrepro[data]"
            ) from None
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, and absl may not run this program
        elements: Any = _Elements(self._cursor, self._ranges)
        read = grain.MapDataset.source(elements).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        )
        return iter(read.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._number, per_worker_buffer_size=2)))

    def close(self) -> None:
        """Ends the processes."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
