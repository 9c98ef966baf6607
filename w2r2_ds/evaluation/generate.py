"""Greedy generation with a KV cache, from fused features or from 2D features only."""

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
    """Generate an answer to each prompt of a batch.

    Args:
        model: model on the batch's device; not sharded by ZeRO-3 (`AnswerValidation` generates through the engine).
        batch: left-padded prompts.
        tokenizer: tokenizer of the VLM.
        geometry: ``fused``, Phi(F2D, F3D), or ``zero``, Phi(F2D, 0).
        max_new_tokens: maximum number of tokens of an answer.
        video_fps: nominal frame rate of the frames, as in training.

    Returns:
        Token ids per sample, without the end-of-turn token.
    """
    visual = model.encode_2d(batch.visuals)
    features = model.encode_3d(batch.visuals)  # with `zero` too, for the shape of the zero features
    merged = model.merge(features) if geometry == "fused" else model.zero_geometry_tokens(features)
    fused = model.fuse(visual, merged)
    return model.family.generate(model.base, batch, batch.visuals, fused, tokenizer, max_new_tokens, video_fps)
