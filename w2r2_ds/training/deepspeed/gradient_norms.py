"""Gradient norms per optimizer group, from the partitions in which DeepSpeed keeps the gradients.

DeepSpeed's functions for a single gradient wait for the device (ZeRO-3) or have a collective (ZeRO-1 and 2) per tensor:
LoRA has hundreds. Here one `torch._foreach_norm` reduces all partitions of a group, and one all-reduce all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def group_norms(
    engine: DeepSpeedEngine, groups: Mapping[str, Iterable[nn.Parameter]], device: torch.device
) -> dict[str, float]:
    """``grad_norm_GROUP`` of every group: global L2 norm before clipping. Collective; reads one tensor.

    Call it after the last backward of an optimizer step and before the update.

    Args:
        engine: the engine.
        groups: group -> trained parameters, in the order of the optimizer's groups.
        device: device of this rank.
    """
    # Squared norms add up over tensors and partitions; the root is taken after the all-reduce.
    squares = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for group, gradients, copies in local_gradients(engine.optimizer, groups):
        squares[group] += squared_norm(gradients).to(device) / copies
    dist.all_reduce(squares)
    return {f"grad_norm_{name}": value for name, value in zip(groups, squares.sqrt().tolist(), strict=True)}


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in float64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    # In float64, because a norm in the dtype of the gradients would have 8 bits in bfloat16.
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()


def local_gradients(
    optimizer: Any, groups: Mapping[str, Iterable[nn.Parameter]]
) -> Iterator[tuple[int, list[Tensor], int]]:
    """Gradients of the optimizer groups as this rank has them.

    Args:
        optimizer: the engine's optimizer.
        groups: group -> trained parameters.

    Yields:
        Index of a group, gradients or partitions of them (padded with zeros), and the number of ranks that have the
        same values.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for index, group in optimizer.sub_group_to_group_id.items():
            if not optimizer.offload_optimizer:
                yield group, optimizer.averaged_gradients[index], 1
            elif optimizer._swappable_optimizer_subgroup(index):  # on NVMe: read into memory tensor by tensor
                yield group, [safe_get_local_grad(parameter) for parameter in optimizer.fp16_groups[index]], 1
            else:
                yield group, [optimizer.fp32_partitioned_groups_flat[index].grad], 1
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):  # ZeRO-1 and 2
        for group, partition in enumerate(optimizer.single_partition_of_fp32_groups):
            yield group, [partition.grad] if optimizer.cpu_offload else optimizer.averaged_gradients[group], 1
    else:
        for group, parameters in enumerate(groups.values()):
            gradients = [gradient for each in parameters if (gradient := safe_get_full_grad(each)) is not None]
            yield group, gradients, dist.get_world_size()
