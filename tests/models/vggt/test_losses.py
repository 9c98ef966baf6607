"""Losses of VGGT: values and gradients against direct computation, targets, and a tiny VGGT that learns one scene."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from w2r2_ds.models.vggt.cameras import decode_pose, unproject_depth
from w2r2_ds.models.vggt.config import HEADS, VGGTConfig
from w2r2_ds.models.vggt.losses import (
    CONFIDENCE_WEIGHT,
    HUBER_THRESHOLD,
    ITERATION_DECAY,
    VGGTTargets,
    camera_loss,
    confidence_loss,
    make_targets,
    vggt_loss,
)
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import HeadOutputs, predict, run_heads

HEIGHT, WIDTH = 28, 42
STEPS = 80
"""Of the optimizer, to fit one scene."""


def two_frames(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A corner of a room from two cameras: images ``[2, 3, H, W]``, depth, intrinsics and world-to-camera transforms.

    Floor, back wall and side wall are planes; the colour of a point depends on its position.
    """
    focal = 40.0
    intrinsics = torch.tensor([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]], dtype=torch.float64)
    intrinsics = intrinsics.expand(2, 3, 3)
    rotation = torch.from_numpy(Rotation.from_euler("yx", [[20, -5], [-5, 10]], degrees=True).as_matrix())
    centre = torch.tensor([[0.5, 1.0, -2.0], [1.5, 0.5, -2.5]], dtype=torch.float64)
    world_to_camera = torch.cat((rotation, -rotation @ centre[..., None]), dim=-1)
    ends = unproject_depth(torch.ones(2, HEIGHT, WIDTH, dtype=torch.float64), intrinsics, world_to_camera)
    rays = ends - centre[:, None, None]
    # Planes x = 4, y = 2 (y points down) and z = 3: depth at which a ray meets each of them.
    depths = (torch.tensor([4.0, 2.0, 3.0]) - centre[:, None, None]) / rays
    depth = torch.where(depths > 0, depths, torch.inf).amin(-1)
    points = centre[:, None, None] + depth[..., None] * rays
    images = 0.5 + 0.5 * (2.0 * points).sin().permute(0, 3, 1, 2)
    return images.to(dtype), depth.to(dtype), intrinsics.to(dtype), world_to_camera.to(dtype)


def random_outputs(generator: torch.Generator) -> tuple[list[torch.Tensor], VGGTTargets]:
    """Small random outputs, as arguments of `HeadOutputs` that require gradients, and targets, in float64."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    maps = (2, 2, 3, 4)
    outputs = [rand(3, 2, 2, 9), rand(*maps), 1 + rand(*maps), rand(*maps, 3), 1 + rand(*maps)]
    valid = rand(*maps) > 0.3
    targets = VGGTTargets(rand(2, 2, 9), rand(*maps), rand(*maps, 3), valid, torch.ones(2))
    return [output.requires_grad_() for output in outputs], targets


def test_gradients_equal_finite_differences() -> None:
    """In float64, with respect to all outputs; no error is at a kink of a norm."""
    outputs, targets = random_outputs(torch.Generator().manual_seed(0))

    def total(*values: torch.Tensor) -> torch.Tensor:
        return vggt_loss(HeadOutputs(*values), targets).total

    assert torch.autograd.gradcheck(total, outputs)


def test_the_total_is_the_sum_of_its_parts() -> None:
    outputs, targets = random_outputs(torch.Generator().manual_seed(1))
    loss = vggt_loss(HeadOutputs(*outputs), targets)
    assert loss.total == loss.camera + loss.depth + loss.points
    assert loss.camera == camera_loss(outputs[0], targets.pose_encoding)
    depth = confidence_loss(outputs[1][..., None], outputs[2], targets.depth[..., None], targets.valid)
    assert loss.depth == depth
    assert loss.points == confidence_loss(outputs[3], outputs[4], targets.points, targets.valid)


def test_camera_loss_equals_the_huber_loss_of_every_iteration() -> None:
    (encodings, *_), targets = random_outputs(torch.Generator().manual_seed(2))
    expected = 0.0
    for index, encoding in enumerate(encodings.detach()):
        numbers = []
        for error in (encoding - targets.pose_encoding).flatten().tolist():
            quadratic = 0.5 * error**2 / HUBER_THRESHOLD
            numbers.append(quadratic if abs(error) < HUBER_THRESHOLD else abs(error) - 0.5 * HUBER_THRESHOLD)
        expected += ITERATION_DECAY ** (len(encodings) - 1 - index) * sum(numbers) / len(numbers)
    assert float(camera_loss(encodings.detach(), targets.pose_encoding)) == pytest.approx(expected, rel=1e-12)


def test_confidence_loss_equals_a_sum_over_pixels() -> None:
    outputs, targets = random_outputs(torch.Generator().manual_seed(3))
    points, confidence = outputs[3].detach(), outputs[4].detach()
    values: list[float] = []
    changes: dict[str, list[float]] = {"row": [], "column": []}
    for index in torch.cartesian_prod(*(torch.arange(size) for size in targets.valid.shape)).tolist():
        b, s, i, j = index
        if not targets.valid[b, s, i, j]:
            continue
        c = float(confidence[b, s, i, j])
        error = points[b, s] - targets.points[b, s]
        values.append(c * float(error[i, j].norm()) - CONFIDENCE_WEIGHT * math.log(c))
        for name, (k, m) in {"row": (i + 1, j), "column": (i, j + 1)}.items():
            if k < 3 and m < 4 and targets.valid[b, s, k, m]:
                changes[name].append(c * float((error[k, m] - error[i, j]).norm()))
    expected = sum(sum(terms) / len(terms) for terms in (values, *changes.values()))
    result = confidence_loss(points, confidence, targets.points, targets.valid)
    assert float(result) == pytest.approx(expected, rel=1e-12)


def test_confidence_minimises_the_loss_at_alpha_over_the_error() -> None:
    """Without the gradient term: ``c * e - alpha log c`` has its minimum at ``c = alpha / e``."""
    target = torch.zeros(1, 1, 2, 2, 1, dtype=torch.float64)
    confidence = torch.full((1, 1, 2, 2), CONFIDENCE_WEIGHT / 0.05, dtype=torch.float64, requires_grad=True)
    confidence_loss(target + 0.05, confidence, target, torch.ones(1, 1, 2, 2, dtype=torch.bool)).backward()
    assert confidence.grad is not None and confidence.grad.abs().max() < 1e-12


def test_invalid_pixels_have_no_influence() -> None:
    outputs, targets = random_outputs(torch.Generator().manual_seed(4))
    loss = vggt_loss(HeadOutputs(*outputs), targets)
    loss.total.backward()
    for output in outputs[1:]:
        assert output.grad is not None and not output.grad[~targets.valid].any() and output.grad[targets.valid].any()


def test_targets_are_in_the_frame_of_the_first_camera_in_units_of_the_mean_distance() -> None:
    _, depth, intrinsics, world_to_camera = two_frames(torch.float64)
    depth[0, :2] = torch.tensor([0.0, math.nan, -1.0] * 14)
    targets = make_targets(depth[None], intrinsics[None], world_to_camera[None])
    assert torch.equal(targets.valid[0], depth > 0)
    first = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2 * math.atan(14 / 40), 2 * math.atan(21 / 40)], dtype=torch.float64)
    torch.testing.assert_close(targets.pose_encoding[0, 0], first, rtol=0, atol=1e-12)
    distance = targets.points[targets.valid].norm(dim=-1)
    assert float(distance.mean()) == pytest.approx(1, abs=1e-12)
    # Depth and cameras have the same unit as the points, and the points are those of the depth.
    again = unproject_depth(targets.depth[0], *decode_pose(targets.pose_encoding[0], HEIGHT, WIDTH))
    torch.testing.assert_close(again, targets.points[0], rtol=0, atol=1e-12)
    # Back in the world, the points are on the planes x = 4, y = 2 and z = 3 of the room.
    rotation, translation = world_to_camera[0].split((3, 1), dim=-1)
    world = (targets.points[0] * targets.scale - translation[:, 0]) @ rotation
    on_plane = (world - torch.tensor([4.0, 2.0, 3.0])).abs().amin(-1)
    assert on_plane[targets.valid[0]].max() < 1e-10


def test_targets_do_not_depend_on_the_world_and_its_unit() -> None:
    _, depth, intrinsics, world_to_camera = two_frames(torch.float64)
    plain = make_targets(depth[None], intrinsics[None], world_to_camera[None])
    other = torch.eye(4, dtype=torch.float64)
    other[:3, :3] = torch.from_numpy(Rotation.from_euler("xyz", [0.3, -1.0, 2.0]).as_matrix())
    other[:3, 3] = torch.tensor([5.0, -3.0, 8.0])
    moved = world_to_camera @ other
    moved[..., 3] *= 10
    changed = make_targets(10 * depth[None], intrinsics[None], moved[None])
    for name in ("pose_encoding", "depth", "points"):
        torch.testing.assert_close(getattr(changed, name), getattr(plain, name), rtol=0, atol=1e-11)
    torch.testing.assert_close(changed.scale, 10 * plain.scale)


def test_a_scene_without_depth_is_rejected() -> None:
    _, depth, intrinsics, world_to_camera = two_frames()
    both = torch.stack((depth, torch.zeros_like(depth)))
    with pytest.raises(ValueError, match="depth"):
        make_targets(both, intrinsics.expand(2, 2, 3, 3), world_to_camera.expand(2, 2, 3, 4))


def errors(vggt: VGGT, images: torch.Tensor, targets: VGGTTargets) -> tuple[float, float, float]:
    """Median error of depth (relative) and of points, and largest error of the transforms from world to camera."""
    predicted = predict(vggt, images)
    _, world_to_camera = decode_pose(targets.pose_encoding[0], HEIGHT, WIDTH)
    return (
        float(((predicted.depth - targets.depth[0]).abs() / targets.depth[0]).median()),
        float((predicted.points - targets.points[0]).norm(dim=-1).median()),
        float((predicted.world_to_camera - world_to_camera).abs().max()),
    )


def test_a_tiny_vggt_learns_two_frames() -> None:
    """All three heads fit one scene: every error falls below a fifth of that of the random model."""
    images, depth, intrinsics, world_to_camera = two_frames()
    targets = make_targets(depth[None], intrinsics[None], world_to_camera[None])
    torch.manual_seed(0)
    config = VGGTConfig(
        embed_dim=32,
        depth=2,
        num_heads=2,
        patch_embed="conv",
        camera_trunk_depth=1,
        camera_num_heads=2,
        dpt_features=16,
        dpt_out_channels=(16, 16, 16, 16),
        dpt_layers=(0, 0, 1, 1),
    )
    vggt = VGGT(config, HEADS)
    before = errors(vggt, images, targets)
    optimizer = torch.optim.Adam(vggt.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        vggt_loss(run_heads(vggt, images[None]), targets).total.backward()
        optimizer.step()
    after = errors(vggt, images, targets)
    assert all(now < 0.2 * start for now, start in zip(after, before, strict=True)), (before, after)
