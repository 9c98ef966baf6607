"""Precomputed inputs of the vision tower equal those that it computes itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from encoder_inputs import pixel_values
from w2r2_ds.data.collate import token_counts, tower_input
from w2r2_ds.models.family import find_family
from w2r2_ds.models.loading import load_vision_spec
from w2r2_ds.models.qwen2_5_vl.vision_inputs import WindowInputs

GRIDS = {"image": [[1, 4, 6], [1, 10, 4]], "video": [[3, 4, 6], [1, 6, 6]]}


def inputs(vlm: Any, grid: torch.Tensor) -> WindowInputs:
    vision = load_vision_spec(vlm.config.name_or_path)
    return WindowInputs.of(grid, vision.merge_size, vision.window_size, vision.patch_size)


@pytest.mark.parametrize("kind", GRIDS)
def test_tokens_equal_those_of_the_stock_call(vlm: Any, kind: str) -> None:
    grid, vision = torch.tensor(GRIDS[kind]), load_vision_spec(vlm.config.name_or_path)
    noise = torch.Generator().manual_seed(0)
    times = [time * vision.temporal_patch_size if kind == "video" else time for time, _, _ in GRIDS[kind]]
    # One frame set per grid, each with an odd row of patches that is cropped.
    frames = [
        torch.randint(256, (time, 3, (rows + 1) * 14, columns * 14), dtype=torch.uint8, generator=noise)
        for time, (_, rows, columns) in zip(times, GRIDS[kind], strict=True)
    ]
    family = find_family("qwen2_5_vl")
    visuals = tower_input(kind, frames, grid, vision, family)
    sizes, pixels = token_counts(grid, vision.merge_size), pixel_values(visuals)
    assert len(pixels) == int(grid.prod(-1).sum()) and visuals.sizes == sizes
    with torch.no_grad():
        ours = family.encode_visuals(vlm, visuals).pooler_output
        stock = vlm.model.get_video_features if kind == "video" else vlm.model.get_image_features
        theirs = torch.cat(stock(pixels, grid, return_dict=True).pooler_output)
    assert tuple(map(len, ours)) == sizes and len(sizes) == int(grid[:, 0].sum())
    assert torch.equal(torch.cat(ours), theirs)


def test_flash_attention_gets_the_longest_segment(vlm: Any) -> None:
    tower = inputs(vlm, torch.tensor(GRIDS["image"]))
    given = tower.arguments(SimpleNamespace(_attn_implementation="flash_attention_2"))
    assert given["cu_seqlens"].tolist() == [0, 24, 64] and given["max_seqlen"] == 40
    assert given["cu_seqlens"].dtype == given["cu_window_seqlens"].dtype == torch.int32
    windows = given["cu_window_seqlens"].diff()
    assert windows.sum() == 64 and given["max_window_seqlen"] == windows.max()
    assert not {"max_seqlen", "max_window_seqlen"} & set(tower.arguments(SimpleNamespace(_attn_implementation="sdpa")))
