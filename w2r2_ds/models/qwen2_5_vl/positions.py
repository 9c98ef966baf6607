"""Rotary positions of Qwen2.5-VL (temporal, height, width), computed on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def position_ids(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Positions of transformers' ``get_rope_index``, after checks that it does not make.

    Args:
        model: on the meta device (only its config and code are used) or loaded.
        input_ids: ``[batch, length]`` int64, CPU.
        mm_token_type_ids: ``[batch, length]`` int, 0 text, 1 image pad, 2 video pad.
        attention_mask: ``[batch, length]``, 0 at padding; None without padding.
        image_grid_thw: ``[images, 3]`` int64 patch grids in order of appearance.
        video_grid_thw: ``[videos, 3]`` int64.
        second_per_grid_ts: ``[videos]`` float seconds between rows of video tokens.

    Returns:
        ``[3, batch, length]`` int64 (temporal, height, width).

    Raises:
        ValueError: the token types do not mark exactly the placeholder tokens, or the grids have another number of
            tokens. ``get_rope_index`` would return wrong positions without an error.
    """
    config: Any = model.config
    if mm_token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"mm_token_type_ids is {tuple(mm_token_type_ids.shape)} but input_ids is {tuple(input_ids.shape)}"
        )
    # One placeholder per merged patch, of either kind.
    merge = config.vision_config.spatial_merge_size**2
    for kind, code, pad, grid in (
        ("image", 1, config.image_token_id, image_grid_thw),
        ("video", 2, config.video_token_id, video_grid_thw),
    ):
        marked = mm_token_type_ids == code
        if not torch.equal(marked, input_ids == pad):
            raise ValueError(f"mm_token_type_ids must be {code} exactly where input_ids is the {kind} pad token {pad}")
        expected = 0 if grid is None else int(grid.prod(-1).sum()) // merge
        if int(marked.sum()) != expected:
            raise ValueError(f"{int(marked.sum())} {kind} pad tokens in the batch but {kind}_grid_thw holds {expected}")
    positions: torch.Tensor
    positions, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        second_per_grid_ts=second_per_grid_ts,
        attention_mask=attention_mask,
    )
    return positions
