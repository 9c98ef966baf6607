"""The two-stream embedding kernel against `index_copy`: both streams, gradients, any order of the visual tokens."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed

HIDDEN = 24


def inputs(dtype: torch.dtype, stream: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 9, HIDDEN, generator=generator).to(stream)
    positions = torch.randperm(18, generator=generator)[:11]
    shortcut, fused = (torch.randn(11, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    return embeddings, positions, shortcut, fused


def test_float32_is_bit_equal() -> None:
    embeddings, positions, shortcut, fused = inputs(torch.float32, torch.float32)
    results, gradients = [], []
    for kernels in ("torch", "triton"):
        text, tokens = embeddings.clone().requires_grad_(), fused.clone().requires_grad_()
        shortcut_stream, fused_stream = dual_stream_embed(text, positions, shortcut, tokens, kernels)
        assert fused_stream.requires_grad and not shortcut_stream.requires_grad
        assert torch.equal(shortcut_stream.flatten(0, 1)[positions], shortcut)
        assert torch.equal(fused_stream.flatten(0, 1)[positions], fused)
        weight = torch.arange(1.0, embeddings.numel() + 1).view_as(embeddings)
        (fused_stream * weight).sum().backward()
        results.append((shortcut_stream, fused_stream))
        gradients.append((text.grad, tokens.grad))
    for expected, ours in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        assert torch.equal(expected, ours)
    assert gradients[1][1].count_nonzero() == gradients[1][1].numel() and results[1][0].ne(results[1][1]).any()


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_bfloat16_tokens_are_copied_exactly(stream: torch.dtype) -> None:
    """Copies do not round, for any dtype of the stream."""
    embeddings, positions, shortcut, fused = inputs(torch.bfloat16, stream)
    ours, expected = (
        dual_stream_embed(embeddings, positions, shortcut, fused, kernels) for kernels in ("triton", "torch")
    )
    for one, two in zip(ours, expected, strict=True):
        assert one.dtype == two.dtype == stream
        assert torch.equal(one, two)


def test_gradient_has_the_dtype_of_the_tokens() -> None:
    embeddings, positions, shortcut, fused = inputs(torch.float32, torch.float32)
    tokens = fused.to(torch.bfloat16).requires_grad_()
    dual_stream_embed(embeddings, positions, shortcut, tokens, "triton")[1].sum().backward()
    assert tokens.grad is not None and tokens.grad.dtype == torch.bfloat16
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_without_visual_tokens_both_streams_are_the_text() -> None:
    embeddings, positions, shortcut, fused = inputs(torch.float32, torch.float32)
    for stream in dual_stream_embed(embeddings, positions[:0], shortcut[:0], fused[:0], "triton"):
        assert torch.equal(stream, embeddings)
