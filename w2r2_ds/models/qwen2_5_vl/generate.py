"""Greedy decoding with a KV cache, from a vision tower's output that is already there."""

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
        vlm: the transformers model; its training mode is put back afterwards.
        prompts: left-padded, on the model's device.
        visuals: kind and grids of the frames.
        visual: output of the vision tower, geometry added or not.
        end: token id of the end of turn.
        pad: padding token id.
        max_new_tokens: longest answer.
        video_fps: nominal frame rate, as in training.
        synced: under ZeRO-3 with several ranks, so that all make as many forward passes as the longest needs.
    """
    given: dict[str, Any] = {}
    if not visuals.dummy:
        given = {"mm_encoder_outputs": {visuals.kind: visual}, f"{visuals.kind}_grid_thw": visuals.grid_thw}
        if visuals.kind == "video":
            seconds = vlm.config.vision_config.temporal_patch_size / video_fps
            given["second_per_grid_ts"] = torch.full((len(visuals.grid_thw),), seconds, device=visuals.grid_thw.device)
    training = vlm.training
    vlm.eval()  # in training mode, checkpointing would switch the cache off and dropout would be on
    try:
        output = vlm.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            mm_token_type_ids=prompts.token_types,
            do_sample=False,
            num_beams=1,
            # Qwen2.5-VL directories carry a repetition penalty, which would change digits: greedy means greedy.
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
