"""Greedy decoding with a KV cache, from the vision tower's output (fused or not)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from w2r2_ds.types.batch import Batch, Prompts, Visuals


@torch.no_grad()
def greedy_tokens(
    vlm: PreTrainedModel,
    prompts: Prompts | Batch,
    visuals: Visuals,
    visual: BaseModelOutputWithPooling,
    end: int,
    pad: int,
    max_new_tokens: int,
    video_fps: float,
    synced: bool = False,
) -> list[list[int]]:
    """Greedy token ids per prompt, cut before the end of turn.

    Args:
        vlm: the transformers model; its training mode is restored afterwards.
        prompts: left-padded, on the model's device.
        visuals: kind and grids of the frames.
        visual: output of the vision tower, fused with geometry or not.
        end: token id of the end of turn.
        pad: padding token id.
        max_new_tokens: longest answer.
        video_fps: nominal frame rate, as in training.
        synced: all ranks make as many forward passes as the longest answer needs (several ranks under ZeRO-3).

    Returns:
        Token ids per prompt, without the end of turn.
    """
    given: dict[str, Any] = {}
    if not visuals.dummy:
        given = {"mm_encoder_outputs": {visuals.kind: visual}, f"{visuals.kind}_grid_thw": visuals.grid_thw}
        if visuals.kind == "video":
            seconds = vlm.config.vision_config.temporal_patch_size / video_fps
            given["second_per_grid_ts"] = torch.full((len(visuals.grid_thw),), seconds, device=visuals.grid_thw.device)
    training = vlm.training
    vlm.eval()  # training mode would disable the KV cache (activation checkpointing) and enable dropout
    try:
        output = vlm.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            mm_token_type_ids=prompts.token_types,
            do_sample=False,
            num_beams=1,
            # generation_config.json of Qwen2.5-VL has a repetition penalty, which would change digits.
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            synced_gpus=synced,
            **given,
        )
    finally:
        vlm.train(training)
    answers = output[:, prompts.input_ids.shape[1] :].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]
