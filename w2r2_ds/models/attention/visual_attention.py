"""Attention of answer tokens to visual tokens, layer by layer, recorded during a pass of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.types.batch import Batch

if TYPE_CHECKING:
    from w2r2_ds.models.family import VlmFamily


class VisualAttention:
    """Records how much the *where* tokens of every sample attend to every visual token; an `OnInput` function.

    Pass it to `on_layer_inputs`, or to a pass order (training/two_pass.py), for one pass over one batch. The hidden
    state that predicts a token is one position before it, so the attention is that of this position. Nothing is copied
    to the host: all answer positions are computed, and those that predict no *where* token get weight 0.

    Args:
        family: VLM family, for the attention weights of a layer.
        batch: training batch; without frames, the maps have no columns.

    Attributes:
        maps: per layer, ``[samples, visual tokens]`` float32: mean over the heads and over the sample's *where* tokens
            of the attention to every visual token of the batch. The rest of the attention, to text, makes a row sum to
            less than 1. 0 for visual tokens of other samples, and for a sample without *where* tokens.
    """

    def __init__(self, family: VlmFamily, batch: Batch) -> None:
        assert batch.layout is not None, "a training batch has a layout"
        self.family, self.visual_tokens = family, batch.visual_tokens
        answer = batch.answer_positions
        self.selected = SelectedTokens.of(batch.layout, answer.sequence, answer.position)
        # Row i of the matrix averages over the answer tokens of sample i that are *where* tokens.
        samples = torch.arange(len(batch.ids), device=answer.sample.device)
        is_own = ((answer.sample == samples[:, None]) & answer.where).float()
        self.mean_of_where = is_own / is_own.sum(-1, keepdim=True).clamp(min=1)
        self.maps: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, index: int, layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        total = self.mean_of_where.new_zeros(len(self.mean_of_where), len(self.visual_tokens))
        first = 0
        for weights in self.family.row_attention(layer, self.selected, hidden, arguments):
            # A sample's tokens have no weight outside its own sequence or group, so the columns of all visual tokens of
            # the batch can be kept.
            to_visual = weights.mean(0).index_select(-1, self.visual_tokens)
            total += self.mean_of_where[:, first : first + len(to_visual)] @ to_visual
            first += len(to_visual)
        self.maps.append(total)

    def mean_map(self) -> Tensor:
        """Mean of `maps` over the layers, ``[samples, visual tokens]`` float32."""
        return torch.stack(self.maps).mean(0)
