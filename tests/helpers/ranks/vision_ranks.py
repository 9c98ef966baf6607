"""Rank script: the vision tower under ZeRO-3 against the stock tower of transformers.

`work` reads the VLM's folder from ``FOLDER/vlm.txt`` and writes ``FOLDER/rankN.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

GRIDS = [[1, 6, 10], [1, 4, 4]]


class Encoder(nn.Module):
    """Forward of the vision tower, as `W2R2` calls it."""

    def __init__(self, vlm: Any) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, visuals: Any) -> torch.Tensor:
        from w2r2_ds.models.family import find_family

        return torch.cat(find_family(self.vlm.config.model_type).encode_visuals(self.vlm, visuals).pooler_output)


def visuals(vlm: Any) -> Any:
    """Noise in place of two frames, one per frame set."""
    from w2r2_ds.data.batching.collate import tower_input
    from w2r2_ds.models.family import find_family
    from w2r2_ds.models.weights.loading import load_vision_spec

    noise = torch.Generator().manual_seed(0)
    frames = [
        torch.randint(256, (1, 3, rows * 14, columns * 14), dtype=torch.uint8, generator=noise)
        for _, rows, columns in GRIDS
    ]
    family, vision = find_family(vlm.config.model_type), load_vision_spec(vlm.config.name_or_path)
    return tower_input("image", frames, torch.tensor(GRIDS), vision, family)


def work(folder: Path) -> None:
    """Entry point of a rank."""
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import HfDeepSpeedConfig

    from encoder_inputs import pixel_values
    from w2r2_ds.models.weights.loading import load_vlm
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    name = (folder / "vlm.txt").read_text()
    stock: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    inputs = visuals(stock)
    with torch.no_grad():
        expected = stock.model.visual(pixel_values(inputs), grid_thw=inputs.grid_thw).pooler_output
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    keep_alive = HfDeepSpeedConfig(settings)
    vlm: Any = load_vlm(name, torch.float32)
    del keep_alive
    engine, *_ = deepspeed.initialize(model=Encoder(vlm.requires_grad_(False)), config=settings)
    weight = vlm.model.visual.patch_embed.proj.weight
    convolutions: list[bool] = []
    stock_convolution = nn.functional.conv3d
    nn.functional.conv3d = lambda *args: (convolutions.append(True), stock_convolution(*args))[1]  # type: ignore[assignment, func-returns-value]
    partitioned = [weight.numel() == 0]
    with torch.no_grad():
        actual = engine(inputs)
    partitioned.append(weight.numel() == 0)
    difference = float((actual - expected).abs().max() / expected.abs().max())
    found = {"partitioned": partitioned, "convolutions": len(convolutions), "difference": difference}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
