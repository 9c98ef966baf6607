"""Input embeddings of both streams equal those of single passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS, Kernels
from w2r2_ds.models.fusion import Add, Gated
from w2r2_ds.models.w2r2 import W2R2, insert_visual_tokens

POSITIONS = torch.tensor([1, 2, 3, 9, 8])


def inputs() -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
    """A batch of two sequences of six tokens with two images; the tokens of the second image are in reverse order."""
    torch.manual_seed(0)
    batch = SimpleNamespace(visuals=SimpleNamespace(dummy=False), visual_tokens=POSITIONS, input_ids=None)
    visual = SimpleNamespace(pooler_output=torch.randn(5, 8).split([3, 2]))
    return batch, torch.randn(2, 6, 8), visual, torch.randn(5, 8)


def model_of(embeddings: torch.Tensor, fusion: Any, kernels: Kernels = TORCH_KERNELS) -> Any:
    """The attributes of a model that `fuse` and `input_streams` use."""
    base = SimpleNamespace(get_input_embeddings=lambda: lambda _: embeddings)
    return SimpleNamespace(kernels=kernels, fusion=fusion, base=base)


@pytest.mark.parametrize("fusion", [Add, Gated])
@pytest.mark.parametrize("zeros", [True, False], ids=["merged", "features"])
@pytest.mark.parametrize("masked", [False, True])
def test_streams_equal_those_of_single_passes(fusion: Any, zeros: bool, masked: bool) -> None:
    """Bit for bit, with the gradient; also if the shortcut's tokens are not F2D."""
    batch, embeddings, visual, geometry = inputs()
    model = model_of(embeddings, fusion(8))
    mask = (lambda images: [images[0] * 0, *images[1:]]) if masked else None
    unfused = W2R2.fuse(model, visual, None if zeros else torch.randn(5, 8))
    one, two = geometry.clone().requires_grad_(), geometry.clone().requires_grad_()
    expected = insert_visual_tokens(batch, embeddings, W2R2.fuse(model, visual, one, mask))
    shortcut, fused = W2R2.input_streams(model, batch, unfused, W2R2.fuse(model, visual, two, mask))
    assert torch.equal(fused, expected) and torch.equal(shortcut, insert_visual_tokens(batch, embeddings, unfused))
    assert not shortcut.requires_grad
    for stream in (fused, expected):
        (stream * torch.arange(96.0).view(2, 6, 8)).sum().backward()
    assert torch.equal(one.grad, two.grad)


def test_both_grids_must_have_the_same_shape() -> None:
    _, embeddings, visual, geometry = inputs()
    with pytest.raises(ValueError, match=r"vision grid is \(5, 8\) .* geometry grid is \(4, 8\)"):
        W2R2.fuse(model_of(embeddings, Add(8)), visual, geometry[:4])


def test_a_dummy_image_leaves_the_embeddings_unchanged() -> None:
    batch, embeddings, visual, geometry = inputs()
    batch.visuals.dummy = True
    model = model_of(embeddings.requires_grad_(), Add(8), ALL_KERNELS)
    shortcut, fused = W2R2.input_streams(model, batch, visual, W2R2.fuse(model, visual, geometry))
    assert fused is embeddings and torch.equal(shortcut, embeddings) and not shortcut.requires_grad
