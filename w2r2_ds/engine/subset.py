"""A fixed part of a data set that all ranks go through together, each its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def draw(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of `wanted` of the `available` samples (all of them if fewer), the same for every world size."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted]


@dataclass(frozen=True)
class Share:
    """What one rank goes through: as many whole batches as every other rank, for all must make as many passes.

    Attributes:
        indices: into the part; the part is repeated from its front until the batches are whole.
        once: per index, False where it is such a repetition and must not count.
    """

    indices: list[int]
    once: list[bool]


def share(count: int, micro_batch: int, rank: int, world_size: int) -> Share:
    """The batches ``rank, rank + world_size, ...`` of a part of `count` samples; no rank changes what a batch holds."""
    whole = -(-count // (world_size * micro_batch)) * world_size * micro_batch
    mine = [index for index in range(whole) if index // micro_batch % world_size == rank]
    return Share([index % count for index in mine], [index < count for index in mine])
