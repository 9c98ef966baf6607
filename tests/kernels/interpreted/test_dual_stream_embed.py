"""Dual emit against index_copy: both streams, the gradient of geometry and text, any order of the visual rows."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.kernels.dual_stream_embed import dual_emit

HIDDEN = 24


def inputs(dtype: torch.dtype, stream: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 9, HIDDEN, generator=generator).to(stream)
    slots = torch.randperm(18, generator=generator)[:11]
    visual, other = (torch.randn(11, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    return embeds, slots, visual, other


@pytest.mark.parametrize("add", [True, False])
def test_float32_is_equal_to_the_last_bit(add: bool) -> None:
    embeds, slots, visual, other = inputs(torch.float32, torch.float32)
    results, gradients = [], []
    for kernels in ("torch", "triton"):
        text, geometry = embeds.clone().requires_grad_(), other.clone().requires_grad_()
        fused, shortcut = dual_emit(text, slots, visual, geometry, add, kernels)
        assert not shortcut.requires_grad
        weight = torch.arange(1.0, fused.numel() + 1).view_as(fused)
        (fused * weight).sum().backward()
        results.append((fused, shortcut))
        gradients.append((text.grad, geometry.grad))
    for torch_way, triton_way in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        assert torch.equal(torch_way, triton_way)
    assert gradients[1][1].count_nonzero() == gradients[1][1].numel() and results[1][0].ne(results[1][1]).any()


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_bfloat16_is_equal_but_for_the_interpreters_rounding(stream: torch.dtype) -> None:
    """The interpreter stores bfloat16 truncated, torch to the nearest: one unit of the last place, 2**-7."""
    embeds, slots, visual, other = inputs(torch.bfloat16, stream)
    for one, two in zip(
        *(dual_emit(embeds, slots, visual, other, True, way) for way in ("torch", "triton")), strict=True
    ):
        assert one.dtype == two.dtype == stream
        torch.testing.assert_close(one.float(), two.float(), rtol=2**-7, atol=0)


def test_gradient_reaches_geometry_of_another_dtype() -> None:
    embeds, slots, visual, other = inputs(torch.float32, torch.float32)
    geometry = other.to(torch.bfloat16).requires_grad_()
    dual_emit(embeds, slots, visual, geometry, True, "triton")[0].sum().backward()
    assert geometry.grad is not None and geometry.grad.dtype == torch.bfloat16
    assert torch.equal(geometry.grad, torch.ones_like(geometry))


def test_no_visual_token_leaves_the_text() -> None:
    embeds, slots, visual, other = inputs(torch.float32, torch.float32)
    for stream in dual_emit(embeds, slots[:0], visual[:0], other[:0], True, "triton"):
        assert torch.equal(stream, embeds)
