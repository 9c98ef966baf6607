"""Statistics of the feature cache: hit rate and size per step; size, limit and free space before the first step."""

from __future__ import annotations

import shutil
from contextlib import suppress

from w2r2_ds.features.lookup import last_size
from w2r2_ds.features.store import FeatureStore, gib
from w2r2_ds.types.batch import Batch


def cache_use(micro_batches: list[Batch]) -> dict[str, float]:
    """``cache_hits``, the fraction of features found in the cache, and ``cache_gib``, its size; empty without a cache.

    Both are values of this rank: the size excludes files that other ranks wrote since its own last write. It is missing
    if a folder of the cache cannot be listed, for example another user's.
    """
    requests = [each for batch in micro_batches for each in batch.visuals.cached_3d + batch.visuals.cached_2d]
    if not requests:
        return {}
    result = {"cache_hits": sum(each.features is not None for each in requests) / len(requests)}
    with suppress(OSError):
        result["cache_gib"] = last_size(requests[0].store) / 2**30
    return result


def describe_cache(cache: FeatureStore) -> str:
    """Size, limit and free disk space of the cache, with a warning if the limit exceeds the free space."""
    free = shutil.disk_usage(cache.folder).free
    try:
        size = cache.size()
    except OSError as error:
        return f"feature cache {cache.folder}: size unknown, {error.filename} cannot be listed"
    line = f"feature cache {cache.folder}: {gib(size)} of at most {gib(cache.limit)} (data.cache_gib), {gib(free)} free"
    if cache.limit - size <= free:
        return line
    return f"{line}\nwarning: the cache may fill the disk, which checkpoints need too; lower data.cache_gib."
