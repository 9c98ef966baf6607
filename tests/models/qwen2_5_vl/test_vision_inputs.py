"""Precomputed inputs of the vision tower equal those that it computes itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from encoder_inputs import pixel_values
from varlen_reference import torch_varlen_on_cpu
from w2r2_ds.data.batching.collate import token_counts, tower_input
from w2r2_ds.models.attention import varlen, vision
from w2r2_ds.models.attention.vision import VISION_ATTENTION
from w2r2_ds.models.family import find_family
from w2r2_ds.models.qwen2_5_vl.vision_inputs import WindowInputs
from w2r2_ds.models.weights.loading import load_vision_spec, load_vlm
from w2r2_ds.types.batch import Visuals, to_device

GRIDS = {"image": [[1, 4, 6], [1, 10, 4]], "video": [[3, 4, 6], [1, 6, 6]]}


def inputs(vlm: Any, grid: torch.Tensor) -> WindowInputs:
    vision = load_vision_spec(vlm.config.name_or_path)
    return WindowInputs.of(grid, vision.merge_size, vision.window_size, vision.patch_size)


def noise_frames(vlm: Any, kind: str) -> Visuals:
    """Frames of noise for `GRIDS`."""
    spec, noise = load_vision_spec(vlm.config.name_or_path), torch.Generator().manual_seed(0)
    times = [time * spec.temporal_patch_size if kind == "video" else time for time, _, _ in GRIDS[kind]]
    # One frame set per grid, each with an odd row of patches that is cropped.
    frames = [
        torch.randint(256, (time, 3, (rows + 1) * 14, columns * 14), dtype=torch.uint8, generator=noise)
        for time, (_, rows, columns) in zip(times, GRIDS[kind], strict=True)
    ]
    return tower_input(kind, frames, torch.tensor(GRIDS[kind]), spec, find_family("qwen2_5_vl"))


@pytest.mark.parametrize("kind", GRIDS)
def test_tokens_equal_those_of_the_stock_call(vlm: Any, kind: str) -> None:
    grid, visuals = torch.tensor(GRIDS[kind]), noise_frames(vlm, kind)
    sizes, pixels = token_counts(grid, vlm.config.vision_config.spatial_merge_size), pixel_values(visuals)
    assert len(pixels) == int(grid.prod(-1).sum()) and visuals.sizes == sizes
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


def test_segments_are_read_on_the_host(vlm: Any) -> None:
    """Only the package flash-attn gets them on the device. The meta device takes the place of a GPU."""
    tower = to_device(inputs(vlm, torch.tensor(GRIDS["image"])), torch.device("meta"))
    for name, device in (("sdpa", "cpu"), (VISION_ATTENTION, "cpu"), ("flash_attention_2", "meta")):
        given = tower.arguments(SimpleNamespace(_attn_implementation=name))
        assert given["cu_seqlens"].device.type == given["cu_window_seqlens"].device.type == device
        assert given["position_ids"].is_meta and given["window_index"].is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GRIDS)
def test_one_attention_call_per_layer(
    tiny_dir: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-equal to the stock tower, which makes one SDPA call per segment and layer."""
    vlm: Any = load_vlm(tiny_dir, dtype)
    stock: Any = AutoModelForImageTextToText.from_pretrained(tiny_dir, dtype=dtype)
    stock.model.visual.patch_embed = vlm.model.visual.patch_embed  # a matrix product in both
    visuals = noise_frames(vlm, kind)
    tower = visuals.tower
    assert isinstance(tower, WindowInputs)
    calls: list[tuple[int, ...]] = []
    sdpa_calls: list[int] = []
    record(monkeypatch, vision, "varlen_attention", lambda *args, **_: calls.append(args[3]))
    record(monkeypatch, varlen, "grouped_sdpa", lambda *args, **_: sdpa_calls.append(len(args[0])))
    with torch.no_grad():
        ours = torch.cat(find_family("qwen2_5_vl").encode_visuals(vlm, visuals).pooler_output)
        theirs = stock.model.visual(pixel_values(visuals).to(dtype), grid_thw=visuals.grid_thw).pooler_output
    assert torch.equal(ours, theirs)
    assert len(calls) == len(vlm.model.visual.blocks)
    segments = {True: tower.frames, False: tower.windows}
    full = vlm.config.vision_config.fullatt_block_indexes
    assert calls == [tuple(np.diff(segments[layer in full])) for layer in range(len(calls))]
    assert len(sdpa_calls) == sum(len(set(lengths)) for lengths in calls) < sum(map(len, calls))


def record(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: Any) -> None:
    """Call `call` with the arguments of every call of a module's function."""
    stock = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **given: (call(*args, **given), stock(*args, **given))[1])


def test_the_tower_calls_varlen_attention_of_torch(vlm: Any) -> None:
    """The path of a GPU in 16 bits: PyTorch's `varlen_attn`, with its operators on the CPU."""
    visuals = noise_frames(vlm, "image")
    encode = find_family("qwen2_5_vl").encode_visuals
    with torch.no_grad():
        expected = torch.cat(encode(vlm, visuals).pooler_output)
        with torch_varlen_on_cpu() as calls:
            actual = torch.cat(encode(vlm, visuals).pooler_output)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(vlm.model.visual.blocks)


def test_other_implementations_stay(tiny_dir: Path) -> None:
    eager: Any = load_vlm(tiny_dir, torch.float32, "eager")
    assert eager.model.visual.config._attn_implementation == "eager"
    assert eager.model.language_model.config._attn_implementation == "eager"
    sdpa: Any = load_vlm(tiny_dir, torch.float32, "sdpa")
    assert sdpa.model.visual.config._attn_implementation == VISION_ATTENTION
    assert sdpa.model.language_model.config._attn_implementation == sdpa.config._attn_implementation == "sdpa"
