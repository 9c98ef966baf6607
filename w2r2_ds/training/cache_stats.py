"""What the feature cache is and did, for the log, and how ranks agree on the calls of a sharded vision tower."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.features.lookup import size_of
from w2r2_ds.features.store import Cache, gib
from w2r2_ds.models.encode import missing_2d
from w2r2_ds.types.batch import Batch, Visuals


def cache_use(micro_batches: list[Batch]) -> dict[str, float]:
    """``cache_hits``, the share of features that the cache had, and ``cache_gib``, its size; nothing without a cache.

    No size where a part of the folder may not be listed, another user's say.

    Of this rank, which sees of the files of other ranks what was there when it last wrote one.
    """
    asked = [each for batch in micro_batches for each in batch.visuals.cached_3d + batch.visuals.cached_2d]
    if not asked:
        return {}
    hits = sum(each.features is not None for each in asked) / len(asked)
    found = {"cache_hits": hits}
    with suppress(OSError):
        found["cache_gib"] = size_of(asked[0].cache) / 2**30
    return found


def describe_cache(cache: Cache) -> str:
    """How large the cache is and may become, for the start of a run; warns where that is more than is free."""
    free = shutil.disk_usage(cache.folder).free
    try:
        size = cache.size()
    except OSError as error:
        return f"feature cache {cache.folder}: its size is not known, {error.filename} cannot be listed"
    held = f"feature cache {cache.folder}: {gib(size)} of at most {gib(cache.limit)} (data.cache_gib), {gib(free)} free"
    if cache.limit - size <= free:
        return held
    return f"{held}\nwarning: it may fill the disk, where checkpoints need room too; lower data.cache_gib."


class TowerCalls:
    """How often all ranks call the vision tower for a batch: under ZeRO-3 it is sharded, and they call it together.

    Only with 2D features cached; then a rank may lack more samples than another. DoctorRequest on the host, through
    gloo, so
    that no rank waits for its GPU.

    Args:
        config: `data.cache` and `data.cached_features`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.group: Any = None
        self.differ = bool(config.cache) and config.cached_features == "geometry+2d"
        if self.differ and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")

    def agreed(self, visuals: Visuals) -> int:
        """The most calls that any rank needs for its batch; 0 where ranks never differ."""
        if self.group is None:
            return 0
        calls = torch.tensor(missing_2d(visuals))
        dist.all_reduce(calls, op=dist.ReduceOp.MAX, group=self.group)
        return int(calls)
