"""Every candidate of `model.kernels: auto` passes the comparison in Triton's interpreter; a broken kernel does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w2r2_ds.kernels import dropout_matmul, measure
from w2r2_ds.kernels.candidates import Shapes, make_candidates
from w2r2_ds.kernels.measure import TOLERANCE, Measurement
from w2r2_ds.kernels.select import ALL_KERNELS

pytestmark = pytest.mark.usefixtures("liger_interpreted")


def measured(dtype: torch.dtype = torch.float32) -> dict[str, Measurement]:
    shapes = Shapes(hidden=40, intermediate=136, rank=4, dropout=0.3, dtype=dtype, rows=67)
    candidates = make_candidates(shapes, torch.device("cpu"))
    return {each.name: measure.measure(each, TOLERANCE[dtype], lambda run: 1.0) for each in candidates}


def test_all_candidates_are_correct() -> None:
    found = measured()
    assert found.keys() == ALL_KERNELS
    for name, each in found.items():
        assert not each.failure and each.error <= each.tolerance, name
    assert found["dropout_matmul"].error > 0, "another order of summation"


def test_tolerance_in_bfloat16() -> None:
    """Kernels of this package. Liger's compute in bfloat16, which the interpreter does not round as a GPU does."""
    found = measured(torch.bfloat16)
    for name in ("lora_projection", "dropout_matmul", "dual_stream_embed"):
        assert not found[name].failure and found[name].error <= found[name].tolerance, found[name]


def test_a_kernel_that_ignores_the_mask_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = dropout_matmul.outer

    def unmasked(low: Any, x: Any, keep: Any, scale: float, kernels: Any) -> Any:
        return stock(low, x, torch.ones_like(keep) if kernels == "triton" else keep, scale, kernels)

    monkeypatch.setattr(dropout_matmul, "outer", unmasked)
    found = measured()
    assert found["dropout_matmul"].error > 10 * found["dropout_matmul"].tolerance and found["dropout_matmul"].rejection
