"""Which decoder layers keep only their input for the backward pass, and where they keep it."""

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
"""Around a layer's first run, and around its second."""


@dataclass(frozen=True)
class Recomputed:
    """A layer's forward that is run again in the backward pass.

    Attributes:
        inner: the forward that the layer had.
        offload, contexts: of `recompute`.
    """

    inner: Callable[..., Any]
    offload: bool
    contexts: Contexts

    def __call__(self, *args: Any, **given: Any) -> Any:
        if not torch.is_grad_enabled():  # the shortcut, decoding: there is no backward pass
            return self.inner(*args, **given)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext():
            inner = functools.partial(self.inner, **given)
            return checkpoint(inner, *args, use_reentrant=False, context_fn=self.contexts)


def recompute(layers: Iterable[Any], every: int, offload: bool, contexts: Contexts) -> None:
    """Run layers 0, `every`, 2 `every`, ... again in the backward pass instead of keeping what they computed.

    Not the last one, which is computed for few rows and keeps little (models/qwen2_5_vl/last_layer.py). Called
    again, it forgets
    what it did before.

    The forward of the instance is bound, whatever it is by now: transformers' `activation_checkpointing_enable` would
    be passed over by a forward that model.kernels has bound to a layer, and before 5.23 it is around the hooks, outside
    of what is bound for the length of a pass. It also counts the blocks of the frozen vision tower, so that it depends
    on their number which decoder layers are meant, and asks for pinned memory on machines that have none.

    Args:
        layers: decoder layers of transformers, in order.
        every: distance of the layers that are run again.
        offload: keep their inputs in the memory of the host, pinned where there is a GPU.
        contexts: for torch's checkpointing.
    """
    layers = list(layers)
    for index, layer in enumerate(layers):
        inner = layer.forward.inner if isinstance(layer.forward, Recomputed) else layer.forward
        again = index % every == 0 and index < len(layers) - 1
        layer.forward = Recomputed(inner, offload, contexts) if again else inner
