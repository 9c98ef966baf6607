"""Fixtures: a tiny Qwen2.5-VL folder, its tokenizer, its model, and inputs of the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = [
    f"Frame-{number}: find the {colour} {label} near the desk. It is at {number}.{number}5, -1.{number}"
    for number in range(8)
    for colour in ("red", "brown", "white")
    for label in ("chair", "table", "cabinet", "sofa")
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts that the tiny tokenizer is trained on."""
    return TEXTS


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Qwen2.5-VL."""
    from w2r2_ds.demo.tiny_models import build_tiny_vlm

    return build_tiny_vlm(tmp_path_factory.mktemp("tiny"), TEXTS, seed=3)


@pytest.fixture(scope="session")
def tokenizer(tiny_dir: Path) -> Any:
    """Tokenizer of the tiny Qwen2.5-VL."""
    from w2r2_ds.models.weights.loading import load_tokenizer

    return load_tokenizer(tiny_dir)


@pytest.fixture(scope="session")
def visual_inputs() -> Any:
    """Function ``visual_inputs(config, tokenizer, "image" | "video", frames=1)``: keyword arguments of the forward."""
    return _visual_inputs


@pytest.fixture
def vlm(tiny_dir: Path) -> Any:
    """The tiny model in float32 and eval mode, loaded for each test."""
    from w2r2_ds.models.weights.loading import load_vlm

    return load_vlm(tiny_dir, torch.float32, "sdpa").eval()


def _visual_inputs(config: Any, tokenizer: Any, kind: str, frames: int = 1) -> dict[str, torch.Tensor]:
    """Batch of two: 8 x 12 patches of noise as image or video, and a question; the second is padded on the right."""
    pad = config.image_token_id if kind == "image" else config.video_token_id
    grid = torch.tensor([[frames, 8, 12]] * 2)
    tokens = int(grid[0].prod()) // 4
    rows = []
    for question in ("find the red chair near the desk", "a sofa"):
        start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        rows.append([start, *([pad] * tokens), end, *tokenizer.encode(question)])
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == pad).int() * (1 if kind == "image" else 2),
        names[0]: pixels,
        names[1]: grid,
    }
