"""Gradient norms by group (LoRA, geometry), from whatever partition ZeRO has left on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import nn


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
