"""What a step is worth over all ranks: its weight, the means of its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import nn

from w2r2_ds.objective.loss import LOSS_PARTS, STATS, sample_weights
from w2r2_ds.types.batch import Batch


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


def group_norms(groups: Mapping[str, Iterable[nn.Parameter]], device: torch.device) -> dict[str, float]:
    """``grad_norm_GROUP`` of every group: L2, over all ranks, before clipping; every rank calls it.

    To be called after the last backward of an optimizer step and before the update. Under ZeRO-3 the partitions are
    summed with one all-reduce; below it DeepSpeed assembles each gradient.
    """
    squares = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for index, parameters in enumerate(groups.values()):
        for parameter in parameters:
            squares[index] += squared_share(parameter)
    dist.all_reduce(squares)
    return {f"grad_norm_{name}": value for name, value in zip(groups, squares.sqrt().tolist(), strict=True)}


def squared_share(parameter: nn.Parameter) -> torch.Tensor | float:
    """This rank's share of the squared gradient norm of a parameter, such that the ranks' shares add up to it."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter).double().square().sum()
    gradient = safe_get_full_grad(parameter)
    if gradient is None:
        return 0.0
    return gradient.double().square().sum() / dist.get_world_size()
