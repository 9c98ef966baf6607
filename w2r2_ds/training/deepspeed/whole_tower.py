"""Keep the frozen vision tower out of ZeRO-3: every rank has all of its weights, and none is gathered."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from w2r2_ds.models.w2r2 import W2R2


def keep_tower_whole(model: W2R2, device: torch.device) -> None:
    """Give this rank a whole copy of the vision tower, and remove the tower from the modules of the model, in place.

    The tower stays an attribute of the model, as VGGT is: `deepspeed.initialize` sees the registered modules only, so
    it neither partitions the tower's weights nor adds hooks to its modules.

    Args:
        model: the composed model, before `deepspeed.initialize`; its weights may be partitioned.
        device: device of this rank.
    """
    tower = model.family.vision_tower(model.base)
    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        for module in tower.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # A new parameter: the old one belongs to ZeRO-3, which frees its data after this block.
                whole = parameter.detach().to(device, copy=True)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
    tower.to(device)  # the buffers
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is tower:
                delattr(parent, name)
                object.__setattr__(parent, name, tower)  # nn.Module's own method would register it again
