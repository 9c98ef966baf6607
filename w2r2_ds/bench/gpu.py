"""What a device's matrix units give, measured: the rate that MFU is a share of."""

from __future__ import annotations

import torch

from w2r2_ds.bench.harness import Lap, timed
from w2r2_ds.models.dtype import resolve_dtype

SIDE = {"cuda": 8192, "cpu": 512}
PRODUCTS = 10


def matrix_rate(device: torch.device, dtype: str) -> float:
    """Operations a second of a large square product, the best of three stretches."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=resolve_dtype(dtype)) for _ in range(2))  # type: ignore[arg-type]
    best = 0.0
    for _ in range(4):  # the first one warms up
        lap = Lap()
        with timed(lap, device):
            for _ in range(PRODUCTS):
                left @ right
        best = max(best, PRODUCTS * 2 * side**3 / lap.total())
    return best
