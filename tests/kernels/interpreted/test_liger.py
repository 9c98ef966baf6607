"""Liger's ops against PyTorch, in float32: the interpreter's bfloat16 arithmetic is no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from w2r2_ds.kernels.norm import add_rms_norm, rms_norm
from w2r2_ds.kernels.rope import rotate
from w2r2_ds.kernels.select import Kernels
from w2r2_ds.kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("liger_interpreted")


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def check(function: Callable[..., Any], *inputs: torch.Tensor, leaves: int) -> None:
    """Results and gradients of the first `leaves` inputs, 1e-5 of their size: sums in another order."""
    ways: list[list[torch.Tensor]] = []
    kernels: Kernels
    for kernels in ("torch", "triton"):
        given = [x.clone().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
        made = function(*(x * 1.0 for x in given), kernels)  # what a kernel writes over is no leaf
        made = made if isinstance(made, tuple) else (made,)
        copies = [each.detach().clone() for each in made]
        sum((each * random(*each.shape, seed=i)).sum() for i, each in enumerate(made)).backward()
        ways.append([*copies, *(x.grad for x in given[:leaves])])
    for one, two in zip(*ways, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_rms_norm() -> None:
    check(lambda x, w, kernels: rms_norm(x, w, 1e-6, kernels), random(2, 3, 24), random(24), leaves=2)


def test_add_rms_norm() -> None:
    """Both results are used, as in a layer."""
    inputs = random(2, 3, 24), random(2, 3, 24, seed=1), random(24)
    check(lambda x, r, w, kernels: add_rms_norm(x, r, w, 1e-6, kernels), *inputs, leaves=3)


def test_swiglu() -> None:
    check(swiglu, random(2, 3, 40), random(2, 3, 40, seed=1), leaves=2)


def test_rotation() -> None:
    angles = random(2, 5, 8).repeat(1, 1, 2)
    check(rotate, random(2, 4, 5, 16), random(2, 2, 5, 16), angles.cos(), angles.sin(), leaves=2)
