"""Number of vision-tower calls per micro-batch, equal on all ranks (needed under ZeRO-3)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.models.w2r2 import missing_2d
from w2r2_ds.types.batch import Visuals


class TowerCallCount:
    """All-reduces the number of vision-tower calls of a micro-batch, so that every rank makes the same number.

    Under ZeRO-3 each call gathers weights from all ranks, so all ranks must make the same number of calls. They differ
    only if 2D features are cached: then a rank calls the tower once per sample that the cache lacks.

    Args:
        config: `data.cache` and `data.cached_features`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.group: dist.ProcessGroup | None = None
        may_differ = bool(config.cache) and config.cached_features == "geometry+2d"
        if may_differ and dist.is_initialized() and dist.get_world_size() > 1:
            # On the host: a reduction on the GPU would make every rank wait for the work queued on its device.
            self.group = dist.new_group(backend="gloo")

    def maximum(self, visuals: Visuals) -> int:
        """Most calls that any rank needs for its batch; 0 where ranks cannot differ. Collective."""
        if self.group is None:
            return 0
        calls = torch.tensor(missing_2d(visuals))
        dist.all_reduce(calls, op=dist.ReduceOp.MAX, group=self.group)
        # Ranks with fewer missing features make up the difference on a dummy image (`W2R2.encode_2d`).
        return int(calls)
