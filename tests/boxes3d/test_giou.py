"""GIoU against hand values, the closed form of axis-aligned boxes and finite differences; direction of its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from host_sync import host_reads
from w2r2_ds.boxes3d.giou import box_giou, oriented_giou
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import corners, euler_angles_to_matrix_torch

UNIT = [0.0, 0, 0, 1, 1, 1, 0, 0, 0]
QUARTER = torch.pi / 4


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_boxes(count: int, seed: int, spread: float, angle: float = 2.0) -> Tensor:
    """``[count, 9]`` float64."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 3, generator=draw, dtype=torch.float64) * spread
    size = torch.rand(count, 3, generator=draw, dtype=torch.float64) * 1.5 + 0.3
    return torch.cat((centre, size, torch.randn(count, 3, generator=draw, dtype=torch.float64) * angle), dim=1)


def test_hand_values() -> None:
    root = 2**0.5
    # (first, second, IoU, union, enclosing volume)
    cases: list[tuple[list[float], list[float], float, float, float]] = [
        (UNIT, UNIT, 1.0, 1.0, 1.0),
        ([0.5, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, 1 / 3, 1.5, 1.5),
        ([1.0, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, 0.0, 2.0, 2.0),
        ([2.0, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, 0.0, 2.0, 3.0),
        ([9.0, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, 0.0, 2.0, 10.0),
        ([99.0, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, 0.0, 2.0, 100.0),
        ([2.0, 3.0, -1, 1, 1, 1, 0, 0, 0], UNIT, 0.0, 2.0, 3.0 * 4 * 2),
        ([0.5, 0.5, 0.5, 1, 1, 1, 0, 0, 0], UNIT, 1 / 15, 1.875, 1.5**3),
        (UNIT, [0.0, 0, 0, 2, 2, 2, 0, 0, 0], 0.125, 8.0, 8.0),
        # A square and itself rotated by 45 degrees: an octagon, 2 (sqrt 2 - 1), in a square with the diagonal as side.
        ([0.0, 0, 0, 1, 1, 1, QUARTER, 0, 0], UNIT, 2**-0.5, 2 - 2 * (root - 1), 2.0),
        # Along the *second* box's axes: a long box rotated by 45 degrees in a square, and the other way round.
        ([0.0, 0, 0, 3, 1, 1, QUARTER, 0, 0], [0.0, 0, 0, 4, 4, 1, 0, 0, 0], 3 / 16, 16.0, 16.0),
        ([0.0, 0, 0, 4, 4, 1, 0, 0, 0], [0.0, 0, 0, 3, 1, 1, QUARTER, 0, 0], 3 / 16, 16.0, 32.0),
    ]
    iou, giou = box_giou(tensor(*(case[0] for case in cases)), tensor(*(case[1] for case in cases)))
    hand = torch.tensor([case[2] for case in cases], dtype=torch.float64)
    filled = torch.tensor([case[3] / case[4] for case in cases], dtype=torch.float64)
    torch.testing.assert_close(iou, hand, atol=1e-12, rtol=0)
    torch.testing.assert_close(giou, hand - 1 + filled, atol=1e-12, rtol=0)


def test_axis_aligned_pairs_follow_the_closed_form() -> None:
    a, b = random_boxes(300, 0, 0.8, angle=0.0), random_boxes(300, 1, 0.8, angle=0.0)
    (low_a, high_a), (low_b, high_b) = ((x[:, :3] - x[:, 3:6] / 2, x[:, :3] + x[:, 3:6] / 2) for x in (a, b))
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    union = a[:, 3:6].prod(-1) + b[:, 3:6].prod(-1) - common
    iou, giou = box_giou(a, b)
    assert (common > 0).any() and (common == 0).any()
    torch.testing.assert_close(iou, common / union, atol=1e-12, rtol=0)
    torch.testing.assert_close(giou, common / union - (hull - union) / hull, atol=1e-12, rtol=0)
    torch.testing.assert_close(box_giou(b, a)[1], giou, atol=1e-12, rtol=0)


def test_enclosing_box_is_the_extent_of_the_corners_along_the_second_boxes_axes() -> None:
    a, b = random_boxes(100, 2, 1.0), random_boxes(100, 3, 1.0)
    turn = euler_angles_to_matrix_torch(b[:, 6:])
    vertices = [torch.from_numpy(np.stack([corners(row) for row in box.numpy()])) for box in (a, b)]
    local = torch.cat(vertices, 1) @ turn
    hull = (local.amax(1) - local.amin(1)).prod(-1)
    iou, giou = box_giou(a, b)
    union = (a[:, 3:6].prod(-1) + b[:, 3:6].prod(-1)) / (1 + iou)
    torch.testing.assert_close(iou, box_iou(a, b), atol=0, rtol=0)
    torch.testing.assert_close(giou, iou - (hull - union) / hull, atol=1e-12, rtol=0)
    assert ((giou >= -1) & (giou <= iou)).all()


def test_invariant_to_a_common_transform_and_scale() -> None:
    a, b = random_boxes(50, 4, 0.8), random_boxes(50, 5, 0.8)
    turn = euler_angles_to_matrix_torch(tensor([0.5, -1.0, 2.0])).expand(50, 3, 3)
    shift = torch.tensor([3.0, -20.0, 7.0], dtype=torch.float64)
    moved = [
        part
        for box in (a, b)
        for part in (
            2 * ((turn @ box[:, :3, None]).squeeze(-1) + shift),
            2 * box[:, 3:6],
            turn @ euler_angles_to_matrix_torch(box[:, 6:]),
        )
    ]
    for one, other in zip(oriented_giou(*moved), box_giou(a, b), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_gradient_matches_finite_differences() -> None:
    """At random angles no two faces coincide. Half of the pairs overlap."""
    a = torch.cat((random_boxes(4, 6, 0.15), random_boxes(4, 7, 3.0)))
    b = torch.cat((random_boxes(4, 8, 0.15), random_boxes(4, 9, 3.0)))
    iou, _ = box_giou(a, b)
    assert (iou[:4] > 0.01).all() and (iou[4:] == 0).all()
    assert torch.autograd.gradcheck(box_giou, (a.requires_grad_(), b.requires_grad_()), eps=1e-7, atol=1e-6)


def test_the_gradient_moves_disjoint_boxes_together() -> None:
    """Where IoU has no gradient, that of GIoU brings the centres closer, and enough steps make an overlap."""
    a, b = random_boxes(64, 10, 4.0), random_boxes(64, 11, 4.0)
    iou, giou = box_giou(a.requires_grad_(), b)
    apart = iou == 0
    assert apart.sum() > 32
    (pull,) = torch.autograd.grad(giou.sum(), a)
    assert ((pull[:, :3] * (b - a)[:, :3]).sum(-1) > 0)[apart].all()

    guess = tensor([3.0, -2.0, 1.0, 1, 1, 1, 0.2, 0, 0]).requires_grad_()
    target = tensor([0.2, -0.1, 0.3, 1.2, 0.8, 0.9, 0.4, 0.1, -0.2])
    optimiser = torch.optim.Adam([guess], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        (1 - box_giou(guess, target)[1]).sum().backward()
        optimiser.step()
    assert box_giou(guess, target)[0].item() > 0.7


def test_invalid_boxes_give_minus_one_and_no_gradient() -> None:
    bad = [
        [0.0, 0, 0, 1, 0, 1, 0, 0, 0],
        [0.0, 0, 0, 1, -1, 1, 0, 0, 0],
        [0.0, 0, 0, torch.inf, 1, 1, 0, 0, 0],
        [torch.nan, 0.0, 0, 1, 1, 1, 0, 0, 0],
        [0.0, 0, 0, 1, 1, 1, torch.nan, 0, 0],
    ]
    a, b = tensor(*bad, UNIT, UNIT).requires_grad_(), tensor(*[UNIT] * len(bad), [torch.nan] * 9, UNIT)
    iou, giou = box_giou(a, b)
    assert iou.tolist() == [0.0] * 6 + [1.0]
    assert giou.tolist() == [-1.0] * 6 + [1.0]
    giou.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()
    assert not a.grad[:-1].any()


def test_extreme_boxes_stay_in_range_with_a_finite_gradient() -> None:
    extreme = [
        [1e300, 0.0, 0, 1, 1, 1, 0, 0, 0],
        [1e308, 1e308, -1e308, 1e-300, 1e-300, 1e-300, 0, 0, 0],
        [0.0, 0, 0, 1e300, 1e300, 1e300, 1, 1, 1],
        [0.0, 0, 0, 1e-300, 1e-300, 1e-300, 1, 1, 1],
        [0.0, 0, 0, 1e6, 1e-6, 1, 0.3, 0.2, 0],
        [1e9, 1e9, 1e9, 1, 1, 1, 0, 0, 0],
        [1e60, 1e60, 1e60, 1, 1, 1, 0.1, 0, 0],
    ]
    a = tensor(*extreme).requires_grad_()
    _, giou = box_giou(a, tensor(*[UNIT] * len(extreme)))
    assert ((giou >= -1) & (giou <= 1)).all()
    giou.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_identical_boxes_have_a_finite_gradient() -> None:
    a = random_boxes(100, 12, 1.0)
    iou, giou = box_giou(a.requires_grad_(), a.detach().clone())
    torch.testing.assert_close(giou, torch.ones(100, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (giou <= iou).all()
    giou.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_dtypes_empty_batches_and_wrong_shapes() -> None:
    a = random_boxes(3, 13, 1.0)
    for given, expected in ((a, torch.float64), (a.float(), torch.float32), (a.bfloat16(), torch.float32)):
        assert [value.dtype for value in box_giou(given, given)] == [expected] * 2
    assert [value.shape for value in box_giou(a[:0], a[:0])] == [(0,)] * 2
    with pytest.raises(ValueError, match=r"boxes_a must have shape \[n, 9\], not \[9\]"):
        box_giou(a[0], a)


def test_meta_tensors() -> None:
    empty = torch.empty(4, 9, device="meta", requires_grad=True)
    iou, giou = box_giou(empty, empty)
    assert iou.shape == giou.shape == (4,)
    a, b = random_boxes(4, 14, 1.0).requires_grad_(), random_boxes(4, 15, 1.0)
    assert not host_reads(lambda: box_giou(a, b)[1].sum().backward())
