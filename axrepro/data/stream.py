"""Input that can only be read from its beginning: `Stream`, and its batches."""

import itertools
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from axrepro.core.sharding import Rules
from axrepro.data.base import Batches, Data, Examples, Split, batch_shardings, local_rows, place
from axrepro.errors import UserError, require, require_sizes


@dataclass(frozen=True, kw_only=True)
class Stream(Data):
    """The config of input that comes as a stream, in one or several shards.

    A run sees the same batches whether or not it was interrupted, and on any number of hosts, as long as the files, the
    number of shards, and the versions of the libraries that read them stay the same. To continue, a stream skips what
    was used before: it makes those examples and drops them, so the restart of a long run is slow. Records that can be
    looked up by number restart at once: `python -m axrepro.data convert` writes the rows of a stream as such, for a
    `Pipeline` to read, which pays for runs of more than a few hours.

    Attributes:
      shards: parts that are read separately; row r of a batch comes from shard `r * shards // batch_size`. Each process
        reads the shards whose rows lie on its devices, so give at least one for every host that should share the work.
    """

    shards: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_sizes(self, "shards")
        require(self, "shards", self.batch_size % self.shards == 0, f"a divisor of the batch size, {self.batch_size}")

    @abstractmethod
    def examples(self, split: Split, seed: int, epoch: int, shard: int) -> Iterator[dict[str, np.ndarray]]:
        """One epoch of one shard, of the shapes and types of `abstract` without the batch axis.

        It is the same at every call with the same arguments, in every process. The eval split has epoch 0 alone, in its
        natural order.

        Raises:
          UserError: naming the file or record, if one is missing, unreadable or malformed.
        """

    def endless(self, split: Split) -> bool:
        """Whether an epoch has no end."""
        return False

    def open(self, split: Split, seed: int) -> Examples:
        raise UserError(f"{type(self).__name__} is a stream, which has no examples by number; read its batches")

    def batches(self, split: Split, seed: int, mesh: Mesh, rules: Rules = Rules()) -> "StreamBatches":
        return StreamBatches(self, split, seed, mesh, rules)


class StreamBatches(Batches):
    """Batches of a stream: train without end, eval once through.

    Every shard starts its next epoch when it ends one, whatever the others do. In the eval split the shards that ended
    give padding, all zeros (`segment_ids` 0, `valid` False), until the last one ends; since each process has to know
    when, it reads all shards of that split.

    The position is the number of rows handed out and of shards. A run may go on with another batch size.
    """

    def __init__(self, stream: Stream, split: Split, seed: int, mesh: Mesh, rules: Rules = Rules()):
        """
        Raises:
          UserError: if the batch does not divide over the mesh, or the eval split has nothing that tells padding.
        """
        self._stream, self._split, self._seed = stream, split, seed
        self._arrays = stream.abstract()
        if split == "eval" and not {"segment_ids", "valid"} & self._arrays.keys():
            raise UserError(
                f"{type(stream).__name__} gives {', '.join(self._arrays)}; its eval split needs segment_ids or valid, "
                "which are 0 in the rows that fill up the last batches"
            )
        self._each = {name: (array.shape[1:], np.dtype(array.dtype)) for name, array in self._arrays.items()}
        self._shardings = batch_shardings(self._arrays, mesh, rules)
        self._per_shard = stream.batch_size // stream.shards
        self._next = 0  # rows handed out
        self._taken = 0  # rows taken of each open shard
        self._open: dict[int, Generator[dict[str, np.ndarray], None, None]] = {}

    def _local(self) -> set[int]:
        """The shards that this process reads."""
        if self._split == "eval":
            return set(range(self._stream.shards))
        ranges = local_rows(self._arrays, self._shardings)
        return {row // self._per_shard for start, stop in ranges for row in range(start, stop)}

    def _rows(self, shard: int) -> Generator[dict[str, np.ndarray], None, None]:
        """A shard, epoch after epoch."""
        for epoch in itertools.count() if self._split == "train" else (0,):
            empty = True
            for example in self._stream.examples(self._split, self._seed, epoch, shard):
                empty = False
                self._check(example)
                yield example
            if empty and self._split == "train":
                raise UserError(
                    f"shard {shard} of {self._stream.shards} has no examples in epoch {epoch} of the train split; "
                    "use fewer shards, or a source with more examples"
                )

    def _check(self, example: Mapping[str, np.ndarray]) -> None:
        each = {name: (np.shape(value), np.asarray(value).dtype) for name, value in example.items()}
        if each != self._each:
            raise UserError(f"{type(self._stream).__name__} gave an example of {each}, and promised {self._each}")

    def _take(self) -> dict[int, list[dict[str, np.ndarray]]]:
        """The examples of the next batch from each shard that is read here, fewer where one ended."""
        wanted = self._next // self._stream.shards
        if not self._open or wanted < self._taken:
            self.close()
            self._open = {shard: self._rows(shard) for shard in sorted(self._local())}
        try:
            for rows in self._open.values():
                next(itertools.islice(rows, wanted - self._taken, wanted - self._taken), None)
            taken = {shard: list(itertools.islice(rows, self._per_shard)) for shard, rows in self._open.items()}
        except BaseException:  # a shard that failed would pass for one that ended
            self.close()
            raise
        self._taken = wanted + self._per_shard
        return taken

    def __next__(self) -> dict[str, jax.Array]:
        taken = self._take()
        if not any(taken.values()):
            if not self._next:
                raise UserError(f"the data has no examples in the {self._split} split, so there are no batches")
            self._taken = self._next // self._stream.shards  # the shards stay at their end
            raise StopIteration

        def rows(start: int, stop: int) -> dict[str, np.ndarray]:
            made = {name: np.zeros((stop - start, *x.shape[1:]), x.dtype) for name, x in self._arrays.items()}
            for row in range(start, stop):
                shard, number = divmod(row, self._per_shard)
                if number < len(taken[shard]):
                    for name, value in taken[shard][number].items():
                        made[name][row - start] = value
            return made

        batch = place(rows, self._arrays, self._shardings)
        self._next += self._stream.batch_size
        return batch

    def position(self) -> dict:
        return {"next_example": self._next, "shards": self._stream.shards}

    def seek(self, position: Mapping) -> None:
        """Continues from a position; the next batch takes the time to make all rows before it, or those in between."""
        match position:
            case {"next_example": int(index), "shards": int(shards), **rest} if not rest and index is not True:
                pass
            case _:
                raise UserError(
                    f'{position!r} is no position of a stream; it is {{"next_example": N, "shards": K}} with N of 0 or '
                    "more"
                )
        if shards != self._stream.shards:
            raise UserError(
                f"{type(self._stream).__name__}.shards={self._stream.shards}, and the checkpoint was written with "
                f"{shards}: other shards give other batches, so set shards={shards}"
            )
        if index < 0 or index % shards:
            raise UserError(f"{position!r} is no position of a stream: it counts whole rows of every shard, from 0")
        self._next = index

    def close(self) -> None:
        for rows in self._open.values():
            rows.close()  # it may hold files
        self._open, self._taken = {}, 0
