"""Precomputed inputs of the vision tower equal those that it computes itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.data.collate import token_counts
from w2r2_ds.models.family import find_family
from w2r2_ds.models.loading import load_vision_spec
from w2r2_ds.models.qwen2_5_vl.vision_inputs import WindowInputs

GRIDS = {"image": [[1, 4, 6], [1, 10, 4]], "video": [[3, 4, 6], [1, 6, 6]]}


def inputs(vlm: Any, grid: torch.Tensor) -> WindowInputs:
    vision = load_vision_spec(vlm.config.name_or_path)
    return WindowInputs.of(grid, vision.merge_size, vision.window_size, vision.patch_size)


@pytest.mark.parametrize("kind", GRIDS)
def test_tokens_equal_those_of_the_stock_call(vlm: Any, kind: str) -> None:
    grid = torch.tensor(GRIDS[kind])
    merge = vlm.config.vision_config.spatial_merge_size
    width = vlm.model.visual.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(int(grid.prod(-1).sum()), width, generator=torch.Generator().manual_seed(0))
    sizes = token_counts(grid, merge)
    visuals = SimpleNamespace(pixel_values=pixels, grid_thw=grid, sizes=sizes, tower=inputs(vlm, grid))
    with torch.no_grad():
        ours = find_family("qwen2_5_vl").encode_visuals(vlm, visuals).pooler_output
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
