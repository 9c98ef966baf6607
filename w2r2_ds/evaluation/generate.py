"""Greedy generation with a KV cache, from fused or from visual-only features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def generate_tokens(
    model: W2R2, batch: Batch, tokenizer: PreTrainedTokenizerBase, geometry: str, max_new_tokens: int, video_fps: float
) -> list[list[int]]:
    """Greedy token ids per sample, without the end of turn.

    Args:
        model: on the batch's device, not sharded by ZeRO-3 (`AnswerValidation` generates through the engine).
        batch: left-padded prompts.
        tokenizer: the VLM's tokenizer.
        geometry: ``fused``, Phi(F2D, F3D), or ``zero``, Phi(F2D, 0).
        max_new_tokens: longest answer.
        video_fps: nominal frame rate, as in training.
    """
    visual = model.encode_2d(batch.visuals)
    features = model.encode_3d(batch.visuals)
    merged = model.merge(features) if geometry == "fused" else model.zero_geometry_tokens(features)
    fused = model.fuse(visual, merged)
    return model.family.generate(model.base, batch, batch.visuals, fused, tokenizer, max_new_tokens, video_fps)
