"""Both streams' inputs written at once are those that each pass would write for itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.models.emit import LateSum, input_streams
from w2r2_ds.models.fusion import Add, Gated
from w2r2_ds.models.w2r2 import W2R2, place

SLOTS = torch.tensor([1, 2, 3, 9, 8])


def inputs() -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
    """Two sequences of six, two images; the second one's tokens lie in reverse."""
    torch.manual_seed(0)
    batch = SimpleNamespace(visuals=SimpleNamespace(dummy=False), visual_tokens=SLOTS)
    visual = SimpleNamespace(pooler_output=torch.randn(5, 8).split([3, 2]))
    return batch, torch.randn(2, 6, 8), visual, torch.randn(5, 8)


def fused_by(kernels: str, visual: Any, geometry: torch.Tensor, fusion: Any, mask: Any = None) -> Any:
    model: Any = SimpleNamespace(kernels=kernels, fusion=fusion)
    return W2R2.fuse(model, visual, geometry, mask)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_equal_to_placing_either(kernels: str) -> None:
    """`triton` chooses the late sum, which torch's way adds as well: to the last bit, gradient included."""
    batch, embeddings, visual, geometry = inputs()
    alone, together = geometry.clone().requires_grad_(), geometry.clone().requires_grad_()
    expected = place(batch, embeddings, fused_by("torch", visual, alone, Add(8)))
    found = fused_by(kernels, visual, together, Add(8))
    assert isinstance(found, LateSum) == (kernels == "triton")
    fused, shortcut = input_streams(batch, embeddings, visual, found, "torch")
    assert torch.equal(fused, expected) and torch.equal(shortcut, place(batch, embeddings, visual))
    assert not shortcut.requires_grad
    for stream in (fused, expected):
        (stream * torch.arange(96.0).view(2, 6, 8)).sum().backward()
    assert torch.equal(alone.grad, together.grad)


def test_late_sum_is_a_towers_output_like_any() -> None:
    """For decoding, which takes the fused tokens one pass at a time."""
    _, _, visual, geometry = inputs()
    late, eager = (fused_by(kernels, visual, geometry, Add(8)).pooler_output for kernels in ("triton", "torch"))
    assert all(torch.equal(one, two) for one, two in zip(late, eager, strict=True))


def test_only_a_plain_sum_is_late() -> None:
    """Another fusion, and masked tokens, which only the fused stream has, are finished before."""
    _, _, visual, geometry = inputs()
    assert not isinstance(fused_by("triton", visual, geometry, Gated(8)), LateSum)
    masked = fused_by("triton", visual, geometry, Add(8), lambda images: [torch.zeros_like(x) for x in images])
    assert torch.equal(torch.cat(masked.pooler_output), geometry)
    with pytest.raises(ValueError, match=r"vision grid is \(5, 8\) .* geometry grid is \(4, 8\)"):
        fused_by("triton", visual, geometry[:4], Add(8))


def test_a_dummy_goes_nowhere() -> None:
    batch, embeddings, visual, geometry = inputs()
    batch.visuals.dummy = True
    fused, shortcut = input_streams(batch, embeddings.requires_grad_(), visual, LateSum(visual, geometry), "torch")
    assert fused is embeddings and torch.equal(shortcut, embeddings) and not shortcut.requires_grad
