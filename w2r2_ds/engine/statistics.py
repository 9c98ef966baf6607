"""What a step is worth over all ranks: its weight, the means of its statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from w2r2_ds.data.collate import Batch
from w2r2_ds.objective.w2r2 import LOSS_PARTS, STATS, sample_weights


def global_weight(micro_batches: list[Batch], reduction: str, device: torch.device) -> float:
    """Samples (or answer tokens) of the optimizer step over all ranks and micro-batches."""
    weight = sum(sample_weights(batch, reduction).sum() for batch in micro_batches)
    total = torch.as_tensor(weight, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def reduce_stats(stats: torch.Tensor, micro_batches: list[Batch], reduction: str, total: float) -> dict[str, float]:
    """Weighted global means of ``[samples, len(STATS)]``; stops all ranks if any loss is not finite.

    Raises:
        FloatingPointError: names the samples, on every rank.
    """
    weights = torch.cat([sample_weights(batch, reduction) for batch in micro_batches]).to(stats.device)
    finite = torch.isfinite(stats[:, 0])
    # What is in the loss is weighed as the loss is; everything else counts per sample.
    by_loss = torch.tensor([name in LOSS_PARTS for name in STATS], device=stats.device)
    values = stats.double()
    sums = torch.where(by_loss, (values * weights[:, None]).sum(0), values.sum(0))
    count = torch.tensor([float(len(stats))], dtype=torch.float64, device=stats.device)
    packed = torch.cat([sums, count, (~finite).sum()[None].double()])
    dist.all_reduce(packed)
    *totals, samples, bad = packed.tolist()
    if bad:
        ids = [identity for batch in micro_batches for identity in batch.ids]
        mine = [identity for identity, good in zip(ids, finite.tolist(), strict=True) if not good]
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        named = [identity for rank in everyone for identity in rank]
        raise FloatingPointError(f"The loss is not finite; stopped before the update. Samples: {', '.join(named)}.")
    return {name: value / (total if name in LOSS_PARTS else samples) for name, value in zip(STATS, totals, strict=True)}
