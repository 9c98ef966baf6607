"""The inputs of both streams at once, for a schedule that runs them side by side; Phi's sum is left to the kernel."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.kernels.dual_stream_embed import dual_emit
from w2r2_ds.kernels.select import Kernels
from w2r2_ds.models.fusion import check_same_tokens


class LateSum:
    """F2D + G of the fusion `add`, not yet added: `input_streams` does it while it writes the tokens to their places.

    Args:
        visual: a vision tower's output.
        geometry: ``[tokens, hidden]`` merged geometry, in the same order.
    """

    def __init__(self, visual: Any, geometry: Tensor) -> None:
        tokens = sum(len(image) for image in visual.pooler_output)
        check_same_tokens(torch.Size((tokens, visual.pooler_output[0].shape[-1])), geometry.shape)
        self.visual, self.geometry = visual, geometry

    @cached_property
    def pooler_output(self) -> tuple[Tensor, ...]:
        """What a vision tower's output has, for whoever else reads it."""
        sizes = [len(tokens) for tokens in self.visual.pooler_output]
        added = self.geometry.to(self.visual.pooler_output[0].dtype).split(sizes)
        return tuple(tokens + more for tokens, more in zip(self.visual.pooler_output, added, strict=True))


def input_streams(batch: Any, embeddings: Tensor, plain: Any, fused: Any, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Input embeddings of the fused and of the shortcut stream, ``[sequences, length, hidden]``.

    Args:
        batch: says where visual tokens lie; a dummy's lie nowhere.
        embeddings: of the token ids, of the same shape.
        plain: what the shortcut sees, a vision tower's output; no gradient goes to it.
        fused: what the fused pass sees, or a `LateSum`.
        kernels: of `dual_emit`.
    """
    if batch.visuals.dummy:
        return embeddings, embeddings.detach()
    add = isinstance(fused, LateSum)
    seen = torch.cat(plain.pooler_output).detach()
    other = fused.geometry if add else torch.cat(fused.pooler_output)
    return dual_emit(embeddings, batch.visual_tokens, seen, other, add, kernels)
