"""The merger's first step against PyTorch: cropping, order, several grids, and the weight's gradient."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.kernels.cell_norm import cell_norm
from w2r2_ds.kernels.select import Kernels


def normed_and_gradient(dtype: torch.dtype, wide: bool, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """Of grids that are cropped, an empty one, in float32 whatever the weight's dtype; `wide` computes in float32."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(*size, 12, generator=generator) for size in [(2, 4, 7), (0, 4, 4), (1, 3, 2)]]
    weight = torch.linspace(-1, 2, 12).to(dtype)
    features = [grid.to(dtype).float() for grid in features]  # which the interpreter does not have to round
    weight = weight.float() if wide else weight
    weight.requires_grad_()
    normed = cell_norm(features, weight, 1e-6, 2, kernels)
    assert normed.shape == (2 * 2 * 3 + 1, 4, 12) and normed.dtype == weight.dtype
    (normed * torch.arange(normed.numel()).view_as(normed).remainder(7).to(weight.dtype)).sum().backward()
    assert weight.grad is not None
    return normed.detach().float(), weight.grad.float()


def test_float32_is_equal_to_torch() -> None:
    """Up to the order of 312 summands of a few units."""
    ways = [normed_and_gradient(torch.float32, False, kernels) for kernels in ("torch", "triton")]
    for one, two in zip(*ways, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_float32_rounded_once() -> None:
    """Once in float32, all is until the store, which the interpreter truncates: 2**-7."""
    exact = normed_and_gradient(torch.bfloat16, True, "torch")
    for one, two in zip(normed_and_gradient(torch.bfloat16, False, "triton"), exact, strict=True):
        torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-4)


def test_nothing_to_norm_has_a_gradient() -> None:
    weight = torch.ones(8, requires_grad=True)
    normed = cell_norm([torch.zeros(0, 4, 4, 8)], weight, 1e-6, 2, "triton")
    assert normed.shape == (0, 4, 8)
    normed.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_grid_without_a_cell_is_refused() -> None:
    for kernels in ("torch", "triton"):
        with pytest.raises(ValueError, match="a 1 x 4 grid holds no 2 x 2 cell"):
            cell_norm([torch.zeros(1, 1, 4, 8)], torch.ones(8), 1e-6, 2, kernels)
