"""Which backend of PyTorch's `scaled_dot_product_attention` (SDPA) may run: cuDNN for fixed shapes only.

On Hopper and data-centre Blackwell GPUs with cuDNN 9.15.1 or later, SDPA prefers cuDNN's attention to flash attention
(`check_prefer_cudnn_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.11 and later). cuDNN
compiles an execution plan for every new combination of sizes and strides of query, key, value and mask, separately for
forward and backward and for every thread (`MHAParams` in aten/src/ATen/native/cudnn/MHA.cpp). A plan takes 0.02 to 0.5
seconds of host time. The language model has a new shape in most micro-batches, and in every token that it decodes.
The geometry encoder has one shape per number of frames, for which cuDNN is the fastest backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp


def disable_cudnn_sdpa() -> None:
    """Switch cuDNN's attention off for the rest of the process; `load_vlm` calls it.

    The switch is a field of ATen's global context, which every SDPA call of every thread reads when it selects a
    backend. A context manager around the forward pass would not be enough: activation checkpointing repeats forward
    passes in autograd's thread, during the backward pass. On a CPU the switch has no effect.
    """
    enable_cudnn_sdp(False)


@contextmanager
def cudnn_sdpa() -> Iterator[None]:
    """Context in which SDPA may use cuDNN, for calls whose shapes rarely change; restores the previous switch.

    For forward passes without gradient only. The switch is global (see `disable_cudnn_sdpa`), so no backward pass may
    run at the same time.
    """
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(True)
    try:
        yield
    finally:
        enable_cudnn_sdp(before)
