"""Oriented IoU: pairs per second, and error against Monte Carlo and SciPy's half-space intersection."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection, QhullError
from torch import Tensor

from w2r2_ds.bench.harness import find_device, interleave, ratio
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import rotation_matrix

PEER_PAIRS = 100
"""Number of pairs for SciPy, which takes a millisecond per pair."""
CHECKED = 8
QHULL = 1e-7
"""Error of SciPy's value if Qhull's interior point is near a face."""
SIGMAS = 5.0
"""Maximum deviation from the Monte Carlo estimate in standard deviations."""


def iou(pairs: int = 2000, points: int = 1_000_000, rounds: int = 5) -> Report:
    """Pairs of oriented boxes a second, forward and with gradient, and whether the values are right.

    Args:
        pairs: boxes in a call.
        points: of the Monte Carlo estimate, per pair.
        rounds: how often each is run, in turns.
    """
    device = find_device()
    a, b = (boxes.to(device) for boxes in random_pairs(pairs))
    few = [(x, y) for x, y in zip(a[:PEER_PAIRS].cpu().numpy(), b[:PEER_PAIRS].cpu().numpy(), strict=True)]
    peer: list[float] = []

    def with_gradient() -> None:
        leaf = a.clone().requires_grad_()
        box_iou(leaf, b).sum().backward()

    def scipy() -> None:
        peer[:] = [scipy_iou(x, y) for x, y in few]

    spreads = interleave(
        {"ours": lambda: run(a, b), "ours, with gradient": with_gradient, "SciPy": scipy}, rounds, device
    )
    counts = {"SciPy": len(few)}
    report = Report("iou", f"oriented IoU of {pairs} pairs of boxes, float64", [])
    for name, spread in spreads.items():
        each = counts.get(name, pairs)
        report.rows.append({"way": name, "pairs": each, **spread.columns(), "pairs/s": each / spread.median})
    ours = box_iou(a, b)
    off = float((ours[: len(few)].cpu() - torch.tensor(peer)).abs().max())
    report.criteria += [
        Criterion("difference from SciPy", off, QHULL),
        Criterion(
            f"difference from Monte Carlo of {points} points, in standard deviations", sigmas(a, b, points), SIGMAS
        ),
        Criterion("failed gradient checks", float(not gradient_is_right(a, b)), 0.0),
    ]
    per_pair = ratio(spreads["ours"], spreads["SciPy"]) * len(few) / pairs
    report.notes.append(f"A pair costs {per_pair:.3g} of SciPy's, which has no gradient.")
    return report


def run(a: Tensor, b: Tensor) -> None:
    """Case that runs our implementation."""
    box_iou(a, b)


def random_pairs(count: int) -> tuple[Tensor, Tensor]:
    """Two batches ``[count, 9]`` of furniture-sized boxes at any angle, near each other."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        centre = 0.5 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
        size = 0.3 + 1.5 * torch.rand(count, 3, generator=generator, dtype=torch.float64)
        angles = 2 * torch.pi * torch.rand(count, 3, generator=generator, dtype=torch.float64)
        made.append(torch.cat([centre, size, angles], dim=-1))
    return made[0], made[1]


def half_spaces(box: np.ndarray) -> np.ndarray:
    """``[6, 4]`` of ``normal . x + offset <= 0``."""
    rotation = rotation_matrix(box[6:])
    normals = np.concatenate([rotation.T, -rotation.T])
    return np.column_stack([normals, -(normals @ box[:3] + np.tile(box[3:6] / 2, 2))])


def scipy_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU by Qhull from a point inside both boxes; 0 if they do not intersect."""
    spaces = np.concatenate([half_spaces(a), half_spaces(b)])
    inside = inner_point(spaces)
    if inside is None:
        return 0.0
    try:
        corners = HalfspaceIntersection(spaces, inside).intersections
        common = float(ConvexHull(corners).volume)
    except QhullError:  # no volume
        return 0.0
    return common / (float(np.prod(a[3:6]) + np.prod(b[3:6])) - common)


def inner_point(spaces: np.ndarray) -> np.ndarray | None:
    """Centre of the largest inscribed ball; None if the intersection is empty."""
    radius = np.linalg.norm(spaces[:, :3], axis=1, keepdims=True)
    found = linprog(
        [0, 0, 0, -1], np.hstack([spaces[:, :3], radius]), -spaces[:, 3], bounds=[(None, None)] * 3 + [(0, None)]
    )
    return None if not found.success or found.x[3] < 1e-9 else found.x[:3]


def sigmas(a: Tensor, b: Tensor, points: int) -> float:
    """Largest deviation of a few pairs from their Monte Carlo estimate, in standard deviations."""
    exact = box_iou(a[:CHECKED], b[:CHECKED]).cpu().numpy()
    worst = 0.0
    for index, (x, y) in enumerate(zip(a[:CHECKED].cpu().numpy(), b[:CHECKED].cpu().numpy(), strict=True)):
        noise = np.random.default_rng(index)
        inside = x[:3] + (noise.random((points, 3)) - 0.5) * x[3:6] @ rotation_matrix(x[6:]).T
        spaces = half_spaces(y)
        share = float((inside @ spaces[:, :3].T + spaces[:, 3] <= 0).all(-1).mean())
        volumes = np.prod(x[3:6]), np.prod(y[3:6])
        common = exact[index] * (volumes[0] + volumes[1]) / (1 + exact[index])
        wanted = common / volumes[0]
        deviation = np.sqrt(max(wanted * (1 - wanted), 1 / points) / points)
        worst = max(worst, abs(share - wanted) / deviation)
    return worst


def gradient_is_right(a: Tensor, b: Tensor) -> bool:
    """torch's gradient check on a few pairs."""
    arguments: Any = (a[:CHECKED].clone().requires_grad_(), b[:CHECKED].clone().requires_grad_())
    return bool(torch.autograd.gradcheck(box_iou, arguments, raise_exception=False))
