"""Reductions over all ranks: weight of a step, means of statistics, number of vision tower calls."""

from __future__ import annotations

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.models.w2r2 import num_tower_calls
from w2r2_ds.objective.loss import LOSS_PARTS, STATS, sample_weights
from w2r2_ds.types.batch import Batch, Visuals


def global_weight(micro_batches: list[Batch], reduction: str, device: torch.device) -> torch.Tensor:
    """Number of samples (or answer tokens) of an optimizer step, over all ranks and micro-batches. Collective.

    It stays on the device, so that the host does not wait for the all-reduce.

    Args:
        micro_batches: micro-batches of this rank.
        reduction: `objective.reduction`.
        device: device of this rank.

    Returns:
        Scalar in float64.
    """
    weight = sum(sample_weights(batch, reduction).sum() for batch in micro_batches)
    total = torch.as_tensor(weight, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total


def reduce_stats(
    stats: torch.Tensor, micro_batches: list[Batch], reduction: str, total: torch.Tensor
) -> dict[str, float]:
    """Weighted global means of the statistics, with one all-reduce. Collective.

    Args:
        stats: ``[samples, len(STATS)]``, statistics of this rank's micro-batches; the first column is the loss.
        micro_batches: micro-batches of this rank, in the same order.
        reduction: `objective.reduction`.
        total: result of `global_weight`.

    Raises:
        FloatingPointError: a loss on any rank is not finite; raised on every rank, with the ids of the samples.
    """
    weights = torch.cat([sample_weights(batch, reduction) for batch in micro_batches]).to(stats.device)
    finite = torch.isfinite(stats[:, 0])
    # Parts of the loss have the weights of the loss; all other statistics are means over samples.
    by_loss = torch.tensor([name in LOSS_PARTS for name in STATS], device=stats.device)
    rows = stats.double()
    sums = torch.where(by_loss, (rows * weights[:, None]).sum(0), rows.sum(0))
    count = torch.tensor([float(len(stats))], dtype=torch.float64, device=stats.device)
    # Everything in one tensor: one all-reduce, and one copy to the host, per optimizer step.
    packed = torch.cat([sums, count, (~finite).sum()[None].double()])
    dist.all_reduce(packed)
    means = packed[:-2] / torch.where(by_loss, total, packed[-2])
    *values, bad = torch.cat([means, packed[-1:]]).tolist()
    if bad:  # a global count, so all ranks enter this branch and its collective
        ids = [sample_id for batch in micro_batches for sample_id in batch.ids]
        own = [sample_id for sample_id, is_finite in zip(ids, finite.tolist(), strict=True) if not is_finite]
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, own)
        failed = ", ".join(sample_id for rank_ids in by_rank for sample_id in rank_ids)
        raise FloatingPointError(f"The loss is not finite; stopped before the update. Samples: {failed}.")
    return dict(zip(STATS, values, strict=True))


class TowerCallCount:
    """All-reduces the number of vision tower calls of a micro-batch, so that every rank makes the same number.

    Under ZeRO-3 each call gathers weights from all ranks, so all ranks must make the same number of calls. Without a
    cache of 2D features every rank makes one. With it, a rank calls the tower once per uncached frame set.

    Args:
        config: data configuration, for `cache` and `cached_features`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.group: dist.ProcessGroup | None = None
        may_differ = bool(config.cache) and config.cached_features == "geometry+2d"
        if may_differ and dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU: reading the result of a GPU reduction would wait for all work queued on the device.
            self.group = dist.new_group(backend="gloo")

    def maximum(self, visuals: Visuals) -> int:
        """Maximum over ranks of the calls that a batch needs; 0 if all ranks need the same number. Collective."""
        if self.group is None:
            return 0
        calls = torch.tensor(num_tower_calls(visuals))
        dist.all_reduce(calls, op=dist.ReduceOp.MAX, group=self.group)
        # `W2R2.encode_2d` makes up the difference with calls on a dummy image.
        return int(calls)
