"""A linear layer with LoRA that adds the low-rank update into the output of the base product.

PEFT computes ``base(x) + B(A(dropout(x))) * s``. Besides the base product, it writes and reads three tensors of the
output's width, and as many of the input's width in the backward pass. Here cuBLAS adds ``s * low @ B'`` into the output
in place (`addmm_`), with ``low = dropout(x) A'``. The products with dropout are in `dropout_matmul.py`.

Both passes of W2R2 use this projection. The shortcut pass has neither a graph nor dropout, so that no tensor is saved
and no mask is drawn.

Cost in bfloat16, x ``[T, K]`` to ``[T, N]``, rank r. Base product: 2 T K N FLOP. Memory traffic of the update: 2 T K
(read x) + 4 T N (read and write the output) bytes without dropout, 4 T K + 4 T N with; PEFT: 2 T K + 12 T N and
7 T K + 12 T N. On an H100 (790 TFLOP/s, 3.35 TB/s) at T 6304, without / with dropout:

    layer (model)               base        update              update, PEFT
    q_proj (3B, K = N = 2048)   0.067 ms    0.023 / 0.031 ms    0.054 / 0.073 ms
    q_proj (7B, K = N = 3584)   0.20 ms     0.040 / 0.054 ms    0.094 / 0.128 ms
    gate_proj (7B, N = 18944)   1.08 ms     0.156 / 0.170 ms    0.441 / 0.475 ms

Calculated, not measured on a GPU; `launchers/bench.py kernels` measures it.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from w2r2_ds.kernels import dropout_matmul
from w2r2_ds.kernels.select import Backend


def lora_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    kernels: Backend,
) -> Tensor:
    """``x W' + bias + scale * dropout(x) A' B'``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``; frozen, so that neither it nor ``bias`` gets a gradient.
        bias: ``[N]`` or None.
        a: ``[r, K]``.
        b: ``[N, r]``.
        scale: LoRA's alpha / rank.
        p: dropout probability in [0, 1). PyTorch's generator draws the mask; on the CPU it is the mask of `nn.Dropout`.
        kernels: backend of the products with dropout.

    Returns:
        ``[..., N]`` in the common dtype of the inputs; equal to PEFT up to rounding (the output is rounded once less).
    """
    projected: Tensor = _Projection.apply(x, weight, bias, a, b, scale, p, kernels)
    return projected


class _Projection(torch.autograd.Function):
    """`lora_projection` with its own backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        kernels: Any,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # the kernels read rows without a stride
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        # One byte per element, saved for the backward pass. With activation checkpointing the forward runs again, and
        # draws the same mask because torch.utils.checkpoint restores the random state.
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - p) if p else None
        low = rows @ a.t() if keep is None else dropout_matmul.down(rows, keep, a, 1 / (1 - p), kernels)
        out.addmm_(low, b.t(), alpha=scale)
        # The weights are saved as parameters, not as copies: under ZeRO-3 their data is released after the forward, and
        # gathered again before the backward of the layer.
        ctx.save_for_backward(rows, keep, low, weight, a, b)
        ctx.scale, ctx.p, ctx.kernels, ctx.shape = scale, p, kernels, x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, keep, low, weight, a, b = ctx.saved_tensors
        to_x, _, _, to_a, to_b, *_ = ctx.needs_input_grad
        grad = grad.reshape(-1, len(weight))
        # With D = dropout(x) and low = D A': grad_low = s * grad B, grad_A = grad_low' D, grad_B = s * grad' low.
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_x = grad_a = grad_b = None
        if to_x:
            # grad W + dropout(grad_low A), the second product added in place.
            grad_x = grad @ weight
            if keep is None:
                grad_x.addmm_(grad_low, a)
            else:
                dropout_matmul.up_(grad_x, grad_low, a, keep, 1 / (1 - ctx.p), ctx.kernels)
            grad_x = grad_x.view(ctx.shape)
        if to_a:
            if keep is None:
                grad_a = grad_low.t() @ rows
            else:
                grad_a = dropout_matmul.outer(grad_low, rows, keep, 1 / (1 - ctx.p), ctx.kernels)
        if to_b:
            grad_b = (grad.t() @ low).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def bind_lora(module: Any, kernels: Backend) -> None:
    """Replace the forward of one LoRA Linear of PEFT. Cases that are not supported here still use PEFT's forward."""
    module.forward = MethodType(partial(_forward, kernels), module)


def _forward(kernels: Backend, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of `peft.tuners.lora.layer.Linear` with `lora_projection`."""
    adapter = _only_adapter(module)
    if args or kwargs or adapter is None or not _is_supported(module, adapter, x):
        stock: Tensor = type(module).forward(module, x, *args, **kwargs)
        return stock
    dropout = module.lora_dropout[adapter]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    base, a, b = module.base_layer, module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return lora_projection(x, base.weight, base.bias, a, b, module.scaling[adapter], p, kernels)


def _only_adapter(module: Any) -> str | None:
    """Name of the active adapter if it is a single, unmerged, standard LoRA of an `nn.Linear`, else None."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(names) != 1 or module.fan_in_fan_out:
        return None
    standard = names[0] not in module.lora_variant and not module.lora_bias[names[0]]
    supported = isinstance(module.lora_dropout[names[0]], nn.Dropout | nn.Identity)
    return names[0] if standard and supported and type(module.base_layer) is nn.Linear else None


def _is_supported(module: Any, adapter: str, x: Tensor) -> bool:
    """Whether the weights are gathered and have the dtype of the input, and the base is frozen."""
    weight, bias = module.base_layer.weight, module.base_layer.bias
    # ZeRO-3 (`ds_id`) gathers a weight in the hooks of its own module. `lora_projection` uses the weights of
    # `base_layer`, `lora_A` and `lora_B` without calling these modules: their hooks do not run and the weights would be
    # empty. In a leaf module (a decoder layer) all weights are gathered together, by the hooks of the layer itself.
    gathered = not hasattr(weight, "ds_id") or hasattr(weight, "ds_z3_leaf_module")
    one_dtype = x.dtype == weight.dtype == module.lora_A[adapter].weight.dtype
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return gathered and one_dtype and frozen and not torch.is_autocast_enabled(x.device.type)
