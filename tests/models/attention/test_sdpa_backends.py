"""cuDNN's attention: off for the process once a VLM is loaded, on inside the geometry encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp

from w2r2_ds.models.attention.sdpa_backends import cudnn_sdpa
from w2r2_ds.models.build import load_geometry
from w2r2_ds.models.weights.loading import load_vlm


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """Start with PyTorch's default, and restore the switch after the test."""
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(True)
    yield
    enable_cudnn_sdp(before)


def test_loading_a_vlm_disables_cudnn_attention_for_the_process(tiny_dir: Path) -> None:
    load_vlm(tiny_dir, torch.float32)
    assert not cudnn_sdp_enabled()


@pytest.mark.parametrize("before", [False, True])
def test_the_context_restores_the_switch(before: bool) -> None:
    enable_cudnn_sdp(before)
    with pytest.raises(RuntimeError), cudnn_sdpa():
        assert cudnn_sdp_enabled()
        raise RuntimeError
    assert cudnn_sdp_enabled() == before


def test_only_the_geometry_encoder_runs_with_cudnn_attention(
    model_config: Any, vlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch at every SDPA call: False in the language model, True in VGGT."""
    seen: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **given: Any) -> Any:
        seen.append(cudnn_sdp_enabled())
        return real(*args, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    load_geometry(model_config, torch.device("cpu")).encode(torch.rand(2, 3, 28, 42))
    assert seen and all(seen)
    assert not cudnn_sdp_enabled()
    seen.clear()
    vlm.model.language_model(input_ids=torch.arange(9)[None])
    assert seen and not any(seen)
