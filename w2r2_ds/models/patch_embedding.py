"""Compute the patch embedding of a vision tower as a matrix product.

A tower cuts frames into patches beforehand and embeds each with a `Conv3d` whose stride equals its kernel. Each output
is then the product of one patch and the weight, so that the convolution is a matrix product. cuDNN has no fast kernel
for it in bfloat16: seconds instead of milliseconds on some GPUs and versions (transformers issue 45041, PyTorch issue
166643).
"""

from __future__ import annotations

from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn


def use_matrix_products(tower: nn.Module) -> int:
    """Bind a matrix product as forward of every patch convolution in `tower`; returns their number."""
    found = [module for module in tower.modules() if is_patch_convolution(module)]
    for module in found:
        # On the convolution itself, not on the module around it: ZeRO-3's hooks gather the weight when it is called.
        module.forward = MethodType(embed_patches, module)
    return len(found)


def is_patch_convolution(module: nn.Module) -> bool:
    """Whether a module is a `Conv3d` that computes every output from pixels of its own."""
    return (
        isinstance(module, nn.Conv3d)
        and tuple(module.stride) == tuple(module.kernel_size)
        and module.padding in ("valid", (0, 0, 0))
        and tuple(module.dilation) == (1, 1, 1)
        and module.groups == 1
    )


def embed_patches(convolution: nn.Conv3d, patches: Tensor) -> Tensor:
    """Forward of a patch convolution.

    Args:
        convolution: see `is_patch_convolution`.
        patches: ``[patches, channels, *kernel]``; a larger input is convolved as usual.

    Returns:
        ``[patches, width, 1, 1, 1]``, as the convolution.
    """
    if tuple(patches.shape[2:]) != tuple(convolution.kernel_size):
        return nn.Conv3d.forward(convolution, patches)
    embedded = F.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return embedded[:, :, None, None, None]
