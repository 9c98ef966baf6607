"""The pair during pretraining: language model and geometry merger on the visual tokens of the frozen tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from w2r2_ds.demo.pretraining.pair.prompts import Prompts
from w2r2_ds.demo.pretraining.pair.scene_attention import SCENE_ATTENTION
from w2r2_ds.models.merger import GeometryMerger

DENSE_LAYERS = 2
"""First decoder layers, which are trained with the merger on boxes and labels (`stages/dense.py`)."""


class Pair:
    """Language model and geometry merger, with the fusion `add`.

    Args:
        vlm: Qwen2.5-VL; its language model is trained in place.
        merger: geometry merger, trained in place.
        prompts: tokens of the prompts.
    """

    def __init__(self, vlm: Any, merger: GeometryMerger, prompts: Prompts) -> None:
        self.vlm, self.merger, self.prompts = vlm, merger, prompts
        self.text = vlm.model.language_model
        self.text.config._attn_implementation = SCENE_ATTENTION

    def prefix_embeddings(self, visual: Tensor, geometry: Tensor, with_geometry: Tensor) -> Tensor:
        """Input embeddings of system turn and frames.

        Args:
            visual: ``[rooms, frames, tokens, hidden]``.
            geometry: ``[rooms, frames, rows, columns, channels]`` features of the geometry encoder.
            with_geometry: ``[rooms]`` bool; False for rooms in 2D only.

        Returns:
            ``[rooms, prefix tokens, hidden]``.
        """
        merged: Tensor = self.merger(list(geometry)).view(len(visual), -1, visual.shape[-1])
        embeddings: Tensor = self.text.embed_tokens(self.prompts.prefix).expand(len(visual), -1, -1).clone()
        embeddings[:, self.prompts.visual] = visual.flatten(1, 2) + merged * with_geometry[:, None, None]
        return embeddings

    def logits(self, states: Tensor) -> Tensor:
        """Scores ``[..., vocabulary]`` of the next token, from the output of the last layer."""
        scores: Tensor = self.vlm.lm_head(self.text.norm(states))
        return scores

    def matrices(self, early: bool) -> list[nn.Parameter]:
        """Matrices for Muon: those that stage 2 trains (merger and first layers), or the others."""
        first = [*self.merger.parameters(), *self.text.layers[:DENSE_LAYERS].parameters()]
        return [p for p in (first if early else self.text.layers[DENSE_LAYERS:].parameters()) if p.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        """All other trained weights: embeddings, norms and biases."""
        embeddings = self.text.embed_tokens.weight
        found = [p for p in (*self.text.parameters(), *self.merger.parameters()) if p.ndim != 2 or p is embeddings]
        return found
