"""Which decoder layers keep only their input for the backward pass, and where they keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
"""Around a layer's first run, and around its second."""


def recompute(layers: Iterable[Any], every: int, offload: bool, contexts: Contexts) -> None:
    """Run layers 0, `every`, 2 `every`, ... again in the backward pass instead of keeping what they computed.

    Not the last one, which is computed for few rows and keeps little (models/last_layer.py).

    transformers' `activation_checkpointing_enable` does as much, but also counts the blocks of the frozen vision tower,
    so that it depends on their number which decoder layers are meant, and asks for pinned memory on machines that have
    none. What it sets in a layer is the same: the layer's own forward, inside all hooks, calls the function.

    Args:
        layers: decoder layers of transformers, in order.
        every: distance of the layers that are run again.
        offload: keep their inputs in the memory of the host, pinned where there is a GPU.
        contexts: for torch's checkpointing.
    """

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0
        layer._gradient_checkpointing_func = run
