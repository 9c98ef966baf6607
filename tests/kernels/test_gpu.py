"""On a GPU: every kernel against PyTorch at the sizes of Qwen2.5-VL-3B, in the dtype of training.

The comparison itself is tested on any machine: with an error that it must find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from w2r2_ds.kernels import dropout_matmul
from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed
from w2r2_ds.kernels.lora_linear import lora_projection

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
ROWS, WIDTH = 1000, 2048


def random(*size: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)


def both(function: Callable[..., Any], *inputs: torch.Tensor, num_differentiable: int) -> list[tuple[Any, Any, Any]]:
    """(triton, torch, torch in float32) of results and gradients of the first `num_differentiable` inputs."""
    found = []
    for kernels, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float32)):
        # Copies, each a leaf: with shared ones, the gradients of the three runs would add up in one tensor.
        given = [
            x.detach().to(dtype, copy=True).requires_grad_(i < num_differentiable) if x.is_floating_point() else x
            for i, x in enumerate(inputs)
        ]
        torch.manual_seed(3)
        made = function(*(x * 1 if x.is_floating_point() else x for x in given), kernels)
        made = [each for each in (made if isinstance(made, tuple) else (made,))]
        copies = [each.detach().clone() for each in made]
        factors = (random(*each.shape, seed=9, device=each.device.type) for each in made)
        losses = [
            (each * factor).float().sum() for each, factor in zip(made, factors, strict=True) if each.requires_grad
        ]
        torch.stack(losses).sum().backward()
        found.append([*copies, *(x.grad for x in given[:num_differentiable])])
    return list(zip(*found, strict=True))


def close(cases: list[tuple[Any, Any, Any]]) -> None:
    """Errors relative to float32 are at most 10 % larger than PyTorch's in bfloat16: as many roundings or fewer."""
    for triton, torch_, exact in cases:
        error, allowed = ((x.float() - exact).norm() / exact.norm() for x in (triton, torch_))
        assert error <= 1.1 * allowed + 1e-6, f"error {error:.2e}, of PyTorch {allowed:.2e}"


@pytest.mark.gpu
@needs_gpu
def test_dual_stream_embed_is_bit_equal() -> None:
    positions = torch.randperm(ROWS, device="cuda")[:900]
    text, shortcut, fused = random(1, ROWS, WIDTH), random(900, WIDTH, seed=1), random(900, WIDTH, seed=2)
    cases = both(
        lambda text, fused, shortcut, positions, kernels: dual_stream_embed(text, positions, shortcut, fused, kernels),
        *(text, fused, shortcut, positions),
        num_differentiable=2,
    )
    assert all(torch.equal(triton, torch_) for triton, torch_, _ in cases)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_lora_projection_equals_pytorch(p: float) -> None:
    x, a, b, w, bias = (random(*s) for s in [(ROWS, WIDTH), (16, WIDTH), (256, 16), (256, WIDTH), (256,)])
    close(
        both(
            lambda x, a, b, w, bias, kernels: lora_projection(x, w, bias, a, b, 2.0, p, kernels),
            x,
            a,
            b,
            w,
            bias,
            num_differentiable=3,
        )
    )


@pytest.mark.gpu
@needs_gpu
def test_products_of_float32_do_not_use_tf32() -> None:
    x, a, low = random(300, 512).float() + 1e-3, random(16, 512).float() * 1.001, random(300, 16).float() * 1.001
    keep = torch.rand(300, 512, device="cuda") < 0.9
    exact = (x.double() * keep) @ a.double().t()
    for found in (dropout_matmul.down(x, keep, a, 1.0, "triton"), dropout_matmul.down(x, keep, a, 1.0, "torch")):
        assert (found - exact).norm() / exact.norm() < 1e-6
    found = dropout_matmul.outer(low, x, keep, 1.0, "triton")
    exact = low.double().t() @ (x.double() * keep)
    assert (found - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_comparison_finds_a_wrong_gradient(factor: float) -> None:
    """Of `x` only, in the run that stands for Triton's; the values are right."""

    def projection(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, kernels: str) -> torch.Tensor:
        if kernels == "triton":
            x = x.detach() + factor * (x - x.detach())
        return lora_projection(x, w, None, a, b, 2.0, 0.05, "torch")

    sizes = [(50, 64), (16, 64), (32, 16), (32, 64)]
    cases = both(projection, *(random(*size, device="cpu") for size in sizes), num_differentiable=3)
    assert len(cases) == 4
    if factor == 1.0:
        close(cases)
    else:
        with pytest.raises(AssertionError, match="error"):
            close(cases)
