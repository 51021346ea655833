"""Flags for the compiler of the train step, by chip: only those whose effect was seen in a compiled program.

Seen with libtpu of jax 0.10.2 in the steps of llama2_7b (v5p-128; v4-128, v5e-64 and v6e-64 with fewer rows) and
moe_29b (v5p-1024); no program was timed. Changed nothing there, though others set them:
`xla_tpu_enable_async_collective_fusion` (on by default), `xla_tpu_prefer_async_allgather_to_allreduce`,
`xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter`, `xla_tpu_enable_async_collective_fusion_multiple_steps`,
`xla_tpu_overlap_compute_collective_tc`, `xla_tpu_assign_all_reduce_scatter_layout`,
`xla_tpu_relayout_group_size_threshold_for_reduce_scatter`, `xla_tpu_enable_all_experimental_scheduler_features`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of XLA.

    Attributes:
      reason: what it is for, and what was seen.   chips: for which it is set.
    """

    name: str
    value: str
    reason: str
    chips: tuple[str, ...]


_GATHERS = (
    "products run beside gathers of weights. Both are needed; v5e has them by default. Asynchronous gathers of "
    "llama2_7b: 11 of 17 on v5p, 14 of 19 on v4 and v6e, none without; of moe_29b 38 of 57, with 7 GB more temporaries"
)
_SUMS = (
    "products run beside sums of gradients. Both are needed. Asynchronous sums of llama2_7b: 2 of 9 with 13.9 of "
    "34.3 GB on every chip, none without; of moe_29b 23 of 34 with 93.7 of 114.3 GB, with 2 GB more temporaries"
)
_EXCHANGES = (
    "work runs beside exchanges of tokens. All 6 of moe_29b with their 14.8 GB, and 3 more gathers beside "
    "them, with 4 GB more temporaries"
)

FLAGS = (
    Flag(name="xla_enable_async_all_gather", value="true", reason=_GATHERS, chips=("v4", "v5p", "v6e")),
    Flag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        value="true",
        reason=_GATHERS,
        chips=("v4", "v5p", "v6e"),
    ),
    Flag(name="xla_enable_async_all_reduce", value="true", reason=_SUMS, chips=("v4", "v5e", "v5p", "v6e")),
    Flag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        value="true",
        reason=_SUMS,
        chips=("v4", "v5e", "v5p", "v6e"),
    ),
    Flag(name="xla_tpu_enable_async_all_to_all", value="true", reason=_EXCHANGES, chips=("v5p",)),
)


def flags(kind: str) -> tuple[tuple[str, str], ...]:
    """(name, value) of the flags for a kind of chip, such as "v5p"; none where none was tried."""
    return tuple((flag.name, flag.value) for flag in FLAGS if kind in flag.chips)
