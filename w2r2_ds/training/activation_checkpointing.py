"""Activation checkpointing: recompute decoder layers in the backward pass; their inputs stay on the GPU or the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
"""Function that returns two contexts: for a layer's forward, and for its recomputation."""


@dataclass(frozen=True)
class Recomputed:
    """Replacement for a layer's forward that runs it under `torch.utils.checkpoint`.

    Attributes:
        inner: the layer's original forward.
        offload: keep the layer's input in host memory.
        contexts: contexts of forward and recomputation.
    """

    inner: Callable[..., Any]
    offload: bool
    contexts: Contexts

    def __call__(self, *args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():  # detached shortcut pass, decoding: no backward pass
            return self.inner(*args, **given)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext():
            # All layers share their keyword arguments (rotary embeddings, masks). Bound in a partial, they are not
            # among the inputs that `checkpoint` saves, and so are not copied to the host once per layer.
            inner = functools.partial(self.inner, **given)
            # save_on_cpu moves the tensors that `checkpoint` saves: the layer's input.
            return checkpoint(inner, *args, use_reentrant=False, context_fn=self.contexts)


def recompute(layers: Iterable[Any], every: int, offload: bool, contexts: Contexts) -> None:
    """Recompute layers 0, `every`, 2 `every`, ... in the backward pass. A second call replaces the first one.

    The last layer is skipped: its activations are small, because it is computed at the answer positions only
    (models/*/last_layer.py).

    Not transformers' `gradient_checkpointing_enable`: a kernel or a pass order that overrides a layer's forward would
    bypass it; it counts the blocks of the frozen vision tower too; and its offloading needs pinned memory.

    Args:
        layers: decoder layers, in order.
        every: distance between recomputed layers.
        offload: keep the layers' inputs in host memory, pinned if there is a GPU.
        contexts: contexts of forward and recomputation.
    """
    layers = list(layers)
    for index, layer in enumerate(layers):
        # Unwrap the forward of an earlier call, so that a layer is never recomputed twice.
        inner = layer.forward.inner if isinstance(layer.forward, Recomputed) else layer.forward
        is_recomputed = index % every == 0 and index < len(layers) - 1
        layer.forward = Recomputed(inner, offload, contexts) if is_recomputed else inner
