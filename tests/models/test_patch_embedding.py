"""The patch embedding as a matrix product equals the convolution, also with weights that ZeRO-3 has partitioned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from fork_server import HELPERS
from runs import run_ranks
from w2r2_ds.models.patch_embedding import embed_patches, is_patch_convolution, use_matrix_products


def patch_convolution(**changes: Any) -> nn.Conv3d:
    """The convolution of Qwen2.5-VL's patch embedding, narrower."""
    torch.manual_seed(0)
    return nn.Conv3d(
        **{"in_channels": 3, "out_channels": 40, "kernel_size": (2, 14, 14), "stride": (2, 14, 14)} | changes
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_equal_the_convolution_in_float64(dtype: torch.dtype, bias: bool) -> None:
    """Within the rounding of a sum of 1176 products, relative to the largest output."""
    convolution = patch_convolution(bias=bias).to(dtype)
    patches = torch.randn(50, 3, 2, 14, 14, dtype=dtype)
    with torch.no_grad():
        exact = nn.functional.conv3d(
            patches.double(), convolution.weight.double(), convolution.bias.double() if bias else None, (2, 14, 14)
        )
        actual = embed_patches(convolution, patches)
    assert actual.shape == exact.shape == (50, 40, 1, 1, 1) and actual.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert float((actual - exact).abs().max() / exact.abs().max()) <= tolerance


def test_larger_inputs_are_convolved() -> None:
    convolution = patch_convolution()
    video = torch.randn(1, 3, 4, 28, 14)
    assert torch.equal(embed_patches(convolution, video), convolution(video))


@pytest.mark.parametrize(
    "changes", [{"stride": (2, 7, 14)}, {"padding": 1}, {"dilation": 2}, {"groups": 3, "out_channels": 39}]
)
def test_other_convolutions_do_not_change(changes: dict[str, Any]) -> None:
    assert is_patch_convolution(patch_convolution())
    model = nn.Sequential(patch_convolution(**changes), nn.Conv2d(3, 8, 14, 14), nn.Linear(3, 3))
    assert use_matrix_products(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_loaded_model_does_not_convolve(vlm: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = torch.randn(24, 3 * 2 * 14 * 14)
    stock = AutoModelForImageTextToText.from_pretrained(tiny_dir, dtype=torch.float64).model.visual.patch_embed
    with torch.no_grad():
        exact = stock(patches)
        monkeypatch.setattr(nn.functional, "conv3d", None)
        actual = vlm.model.visual.patch_embed(patches)
    assert float((actual - exact).abs().max() / exact.abs().max()) <= 1e-6


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_weight_is_gathered_under_zero3(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "vlm.txt").write_text(str(tiny_dir))
    run_ranks(2, HELPERS / "ranks" / "vision_ranks.py", tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["partitioned"] == [True, True], "before and after the forward"
        assert found["convolutions"] == 0
        assert found["difference"] <= 1e-6
