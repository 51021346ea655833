"""A stream of numbers, and a program that shows which of its rows one of several processes holds."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from axrepro.core import MeshShape, make_mesh
from axrepro.data.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Counting(Stream):
    """Shard s has 3 + 2 s examples in an epoch of the train split, and 2 s in the eval split."""

    opened: list = field(default_factory=list, compare=False)

    def examples(self, split, seed, epoch, shard) -> Iterator[dict[str, np.ndarray]]:
        self.opened.append((split, epoch, shard))
        for number in range(2 * shard + 3 * (split == "train")):
            tokens = np.array([seed, epoch, shard, number], np.int32)
            yield {"tokens": tokens, "segment_ids": np.ones(4, np.int32)}

    def abstract(self):
        return {name: jax.ShapeDtypeStruct((self.batch_size, 4), np.int32) for name in ("tokens", "segment_ids")}

    vocab_size = None


def main(port: int, hosts: int, host: int, devices: int, shards: int, start: int, steps: int):
    """Prints the rows of each batch that lie here, by their number, and the shards that were opened."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // hosts)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", hosts, host)
    stream = Counting(batch_size=16, shards=shards)
    batches = stream.batches("train", 5, make_mesh(MeshShape()))
    batches.seek({"next_example": 16 * start, "shards": shards})
    seen = []
    for _ in range(steps):
        parts = next(batches)["tokens"].addressable_shards
        seen.append(
            {part.index[0].indices(16)[0] + i: row for part in parts for i, row in enumerate(part.data.tolist())}
        )
    print(json.dumps([seen, sorted({shard for _, _, shard in stream.opened})]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
