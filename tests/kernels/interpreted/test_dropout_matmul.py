"""LoRA's products with dropout and the whole projection against PyTorch with the same mask."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.kernels import dropout_matmul
from w2r2_ds.kernels.lora_linear import lora_projection

IMPLEMENTATIONS = ("torch", "triton")


def matrices(rows: int, width: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + width)
    x, out = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    low = torch.randn(rows, rank, generator=generator).to(dtype)
    a = torch.randn(rank, width, generator=generator).to(dtype)
    return x, torch.rand(rows, width, generator=generator) < 0.7, a, low, out


# Tiles are 64 x 128: less than one tile, and several of which some are incomplete.
@pytest.mark.parametrize(("rows", "width", "rank"), [(5, 40, 4), (70, 130, 16), (129, 64, 24)])
def test_products_equal_torch(rows: int, width: int, rank: int) -> None:
    x, keep, a, low, out = matrices(rows, width, rank)
    pairs = [
        [dropout_matmul.down(x, keep, a, 1.25, kernels) for kernels in IMPLEMENTATIONS],
        [dropout_matmul.outer(low, x, keep, 1.25, kernels) for kernels in IMPLEMENTATIONS],
        [dropout_matmul.up_(out.clone(), low, a, keep, 1.25, kernels) for kernels in IMPLEMENTATIONS],
    ]
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)  # another order of up to 130 terms near 1


def test_rows_are_split_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_matmul, "MAX_SPLITS", 2)
    x, keep, _, low, _ = matrices(300, 20, 16)
    torch.testing.assert_close(
        dropout_matmul.outer(low, x, keep, 1.0, "triton"),
        dropout_matmul.outer(low, x, keep, 1.0, "torch"),
        rtol=1e-5,
        atol=1e-4,
    )


def test_bfloat16_products_in_float32() -> None:
    """bfloat16 inputs are multiplied exactly and added in float32; tolerance: the result is rounded, up to 2**-8."""
    x, keep, a, low, out = matrices(70, 130, 16, torch.bfloat16)
    wide = [m.float() for m in (x, a, low, out)]
    pairs = [
        (dropout_matmul.down(x, keep, a, 1.25, "triton"), dropout_matmul.down(wide[0], keep, wide[1], 1.25, "torch")),
        (
            dropout_matmul.outer(low, x, keep, 1.25, "triton"),
            dropout_matmul.outer(wide[2], wide[0], keep, 1.25, "torch"),
        ),
        (
            dropout_matmul.up_(out.clone(), low, a, keep, 1.25, "triton"),
            dropout_matmul.up_(wide[3], wide[2], wide[1], keep, 1.25, "torch"),
        ),
    ]
    for got, exact in pairs:
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), exact, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_projection_equals_torch(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*s, generator=generator) for s in [(2, 35, 48), (56, 48), (56,), (8, 48), (56, 8)]
    )
    results = []
    for kernels in IMPLEMENTATIONS:
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(5)
        out = lora_projection(leaves[0], weight, bias, leaves[1], leaves[2], 2.0, p, kernels)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))


def test_inputs_need_not_be_contiguous() -> None:
    """A slice of a wider tensor keeps its row stride when it is reshaped."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(*s, generator=generator) for s in [(35, 96), (56, 48), (8, 48), (56, 8)])
    results = []
    for kernels in IMPLEMENTATIONS:
        torch.manual_seed(5)
        results.append(lora_projection(x[:, 24:72], weight, None, a, b, 2.0, 0.3, kernels))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
