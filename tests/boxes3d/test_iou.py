"""Oriented IoU against exact golden values, closed forms, Monte Carlo and finite differences."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from host_sync import host_reads
from w2r2_ds.boxes3d.iou import box_iou, oriented_iou
from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix_torch

HERE = Path(__file__).parent.parent / "golden" / "boxes.json"
OTHER = Path(os.environ.get("W2R2_GOLDEN", HERE.parent)) / "boxes.json"
UNIT = [0.0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((OTHER if OTHER.exists() else HERE).read_text())


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_boxes(count: int, seed: int, spread: float = 0.5) -> Tensor:
    """``[count, 9]`` float64."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 3, generator=draw, dtype=torch.float64) * spread
    size = torch.rand(count, 3, generator=draw, dtype=torch.float64) * 1.5 + 0.3
    angles = torch.randn(count, 3, generator=draw, dtype=torch.float64) * 2
    return torch.cat((centre, size, angles), dim=1)


@pytest.mark.golden
def test_exact_values_match(golden: dict[str, Any]) -> None:
    pairs = golden["pairs"]
    iou = box_iou(tensor(*(pair["box1"] for pair in pairs)), tensor(*(pair["box2"] for pair in pairs)))
    expected = torch.tensor([pair["iou"] for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(iou, expected, atol=1e-6, rtol=0)


def test_hand_computed_pairs() -> None:
    cases: list[tuple[list[float], list[float], float]] = [
        *(([s, 0.0, 0, 1, 1, 1, 0, 0, 0], UNIT, (1 - s) / (1 + s)) for s in (0.2, 1 / 3, 0.5, 0.6, 1.0)),
        ([0.5, 0.5, 0.5, 2, 2, 2, 0, 0, 0], [0.0, 0, 0, 2, 2, 2, 0, 0, 0], 3.375 / 12.625),
        (UNIT, [0.0, 0, 0, 2, 2, 2, 0, 0, 0], 0.125),
        (UNIT, [0.0, 0, 0, 2, 2, 2, 0.3, 0.2, 0.1], 0.125),
        (UNIT, [0.0, 0, 0, 1, 1, 2, 0, 0, 0], 0.5),
        (UNIT, [0.0, 0, 0, 1, 1, 1, torch.pi / 4, 0, 0], 0.7071067811865476),
        (UNIT, [0.0, 0, 0, 1, 1, 1, torch.pi / 2, 0, 0], 1.0),
        (UNIT, [9.0, 0, 0, 1, 1, 1, 0, 0, 0], 0.0),
    ]
    a, b = tensor(*(case[0] for case in cases)), tensor(*(case[1] for case in cases))
    expected = torch.tensor([case[2] for case in cases], dtype=torch.float64)
    torch.testing.assert_close(box_iou(a, b), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(box_iou(b, a), expected, atol=1e-12, rtol=0)


def test_random_pairs_match_monte_carlo() -> None:
    """Fraction of 40000 points of the first box in the second, within four standard deviations of the exact one."""
    a, b = random_boxes(24, 0, 0.3), random_boxes(24, 1, 0.3)
    points = torch.rand(24, 40_000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    world = (points * a[:, None, 3:6]) @ euler_angles_to_matrix_torch(a[:, 6:]).transpose(1, 2) + a[:, None, :3]
    local = (world - b[:, None, :3]) @ euler_angles_to_matrix_torch(b[:, 6:])
    inside = (local.abs() <= b[:, None, 3:6] / 2).all(-1).double().mean(-1)
    volume_a, volume_b = a[:, 3:6].prod(-1), b[:, 3:6].prod(-1)
    iou = box_iou(a, b)
    share = iou * (volume_a + volume_b) / ((1 + iou) * volume_a)  # fraction of the first box that is in the second
    assert ((share > 0.05) & (share < 0.95)).sum() > 12
    sigma = (share * (1 - share) / points.shape[1]).clamp(min=0).sqrt()
    assert ((inside - share).abs() <= 4 * sigma + 1e-12).all()


def test_symmetric_and_invariant_to_a_common_transform() -> None:
    a, b = random_boxes(50, 3), random_boxes(50, 4)
    turn = euler_angles_to_matrix_torch(tensor([0.5, -1.0, 2.0])).expand(50, 3, 3)
    shift = torch.tensor([3.0, -20.0, 7.0], dtype=torch.float64)
    parts = [
        part
        for box in (a, b)
        for part in (
            (turn @ box[:, :3, None]).squeeze(-1) + shift,
            box[:, 3:6],
            turn @ euler_angles_to_matrix_torch(box[:, 6:]),
        )
    ]
    torch.testing.assert_close(box_iou(a, b), box_iou(b, a), atol=1e-12, rtol=0)
    torch.testing.assert_close(oriented_iou(*parts), box_iou(a, b), atol=1e-10, rtol=0)


def test_identical_boxes_give_one() -> None:
    a = random_boxes(200, 5)
    torch.testing.assert_close(box_iou(a, a), torch.ones(200, dtype=torch.float64), atol=1e-12, rtol=0)
    other_angles = torch.cat((a[:, :6], a[:, 6:] + 2 * torch.pi), 1)
    torch.testing.assert_close(box_iou(a, other_angles), torch.ones(200, dtype=torch.float64), atol=1e-9, rtol=0)


def test_nearly_aligned_cubes_follow_the_closed_form() -> None:
    """A unit square and itself rotated by t overlap by 2 / (1 + sin t + cos t); t from rounding error to 36 degrees."""
    angle = torch.logspace(-17, -0.2, 300, dtype=torch.float64)
    ones = torch.ones(300, 3, dtype=torch.float64)
    yaw = torch.stack((angle, angle * 0, angle * 0), dim=1)
    base = euler_angles_to_matrix_torch(tensor([0.3, 0.4, 0.5])).expand(300, 3, 3)
    shared = 2 / (1 + angle.sin() + angle.cos())
    iou = oriented_iou(ones * 7.3, ones, base, ones * 7.3, ones, base @ euler_angles_to_matrix_torch(yaw))
    torch.testing.assert_close(iou, shared / (2 - shared), atol=1e-7, rtol=0)


def test_nearly_identical_boxes_are_nearly_one() -> None:
    """Dropping or double-counting a nearly coplanar face would change the result."""
    a = random_boxes(100, 6)
    noise = random_boxes(100, 7)
    for scale in (1e-15, 1e-12, 1e-9, 1e-8, 3e-8, 1e-7, 1e-6, 1e-5):
        iou = box_iou(a, a + scale * noise)
        assert (1 - iou).max() < 60 * scale + 2e-7
        torch.testing.assert_close(iou, box_iou(a + scale * noise, a), atol=2e-7, rtol=0)


def test_gradient_matches_finite_differences() -> None:
    a, b = random_boxes(6, 8, 0.3).requires_grad_(), random_boxes(6, 9, 0.3).requires_grad_()
    assert (box_iou(a, b) > 0.01).all()
    assert torch.autograd.gradcheck(box_iou, (a, b), eps=1e-7, atol=1e-6)


def test_gradient_ascent_finds_the_box() -> None:
    target = tensor([0.2, -0.1, 0.3, 1.2, 0.8, 0.9, 0.4, 0.1, -0.2])
    guess = tensor([0.4, 0.1, 0.2, 1.0, 1.0, 1.0, 0.2, 0.0, 0.0]).requires_grad_()
    optimiser = torch.optim.Adam([guess], lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        (1 - box_iou(guess, target)).sum().backward()
        optimiser.step()
    assert box_iou(guess, target).item() > 0.9


def test_invalid_boxes_give_zero_and_a_finite_gradient() -> None:
    bad = [
        [0.0, 0, 0, 1, 0, 1, 0, 0, 0],
        [0.0, 0, 0, 1, -1, 1, 0, 0, 0],
        [0.0, 0, 0, torch.inf, 1, 1, 0, 0, 0],
        [torch.nan, 0.0, 0, 1, 1, 1, 0, 0, 0],
        [0.0, 0, 0, 1, 1, 1, torch.nan, 0, 0],
        [0.0, -torch.inf, 0, 1, 1, 1, 0, 0, 0],
    ]
    a, b = tensor(*bad, UNIT).requires_grad_(), tensor(*[UNIT] * (len(bad) + 1))
    iou = box_iou(a, b)
    assert iou.tolist() == [0.0] * len(bad) + [1.0]
    iou.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert not a.grad[:-1].any()


def test_extreme_boxes_stay_in_range_with_a_finite_gradient() -> None:
    extreme = [
        [1e300, 0.0, 0, 1, 1, 1, 0, 0, 0],
        [0.0, 0, 0, 1e300, 1e300, 1e300, 1, 1, 1],
        [0.0, 0, 0, 1e-300, 1e-300, 1e-300, 1, 1, 1],
        [0.0, 0, 0, 1, 1, 1e-12, 0.3, 0, 0],
        [0.0, 0, 0, 1e6, 1e-6, 1, 0.3, 0.2, 0],
        [1e9, 1e9, 1e9, 1, 1, 1, 0, 0, 0],
        [1e308, 1e308, 1e308, 1e308, 1, 1, 1e308, 1, 1],
    ]
    a = tensor(*extreme).requires_grad_()
    iou = box_iou(a, tensor(*[UNIT] * len(extreme)))
    iou.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert ((iou >= 0) & (iou < 1e-5)).all()


def test_boxes_far_from_the_origin() -> None:
    """Centres that overflow in units of the box: two equal ones, and two with the distance of a side."""
    tiny = [1e300, 0.0, 0, 1e-300, 1e-300, 1e-300, 0, 0, 0]
    a = tensor(tiny, [1e300, 1e-300, 0, *tiny[3:]]).requires_grad_()
    b = tensor(tiny, tiny)
    iou = box_iou(a, b)
    torch.testing.assert_close(iou, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    iou.sum().backward()
    assert a.grad is not None
    assert not a.grad.isnan().any()


def test_gradient_is_finite_where_faces_coincide() -> None:
    rows = (UNIT, [1.0, 0, 0, 1, 1, 1, 0, 0, 0], [0.5, 0, 0, 1, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 2, 0, 0, 0])
    a = tensor(*rows).requires_grad_()
    box_iou(a, tensor(*[UNIT] * len(rows))).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_result_dtype_and_empty_batches() -> None:
    a = random_boxes(3, 12)
    assert box_iou(a, a).dtype == torch.float64
    assert box_iou(a.float(), a).dtype == torch.float32
    assert box_iou(a.bfloat16(), a.bfloat16()).dtype == torch.float32
    assert box_iou(a[:0], a[:0]).shape == (0,)


def test_meta_tensors() -> None:
    """They have no values: a host sync or a data-dependent shape would fail."""
    empty = torch.empty(4, 9, device="meta")
    assert box_iou(empty, empty).shape == (4,)


def test_no_host_sync_in_forward_and_backward() -> None:
    """Control: `Tensor.prod` tests for zeros on the host in its backward pass, which `host_reads` detects."""
    a, b = random_boxes(4, 15).requires_grad_(), random_boxes(4, 16)
    assert host_reads(lambda: a.prod(-1).sum().backward())
    assert not host_reads(lambda: box_iou(a, b).sum().backward())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_equals_cpu_without_a_sync() -> None:
    a, b = random_boxes(64, 13), random_boxes(64, 14)
    on_gpu = a.cuda().requires_grad_()
    other = b.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iou = box_iou(on_gpu, other)
        iou.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(iou.cpu(), box_iou(a, b), atol=1e-10, rtol=0)


def test_wrong_shape_raises_with_the_shape() -> None:
    with pytest.raises(ValueError, match=r"boxes_b must have shape \[n, 9\], not \[2, 7\]"):
        box_iou(torch.zeros(2, 9), torch.zeros(2, 7))
