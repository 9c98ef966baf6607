"""Exact IoU of oriented boxes: batched, differentiable, without loops over data, data-dependent shapes or host syncs.

Two boxes share the polytope ``{x : n_i . x <= b_i}`` of their 12 half-spaces. By the divergence theorem

    volume = 1/3 sum_i b_i area_i,        area_i = 1/2 sum_j c_ij length_ij

where ``area_i`` is the part of plane i on the polytope, ``c_ij`` the signed distance of line (i, j) from plane i's foot
point and ``length_ij`` the part of that line inside all other half-spaces: one interval, a maximum and a minimum
(J. Lasserre, "An analytical expression and an algorithm for the volume of a convex polyhedron in R^n", JOTA 39, 1983).
So a pair costs 12 x 12 x 12 interval bounds (about 14 KB per tensor in float64), for any boxes.

Coplanar faces: of parallel planes (and, inside a plane, of parallel lines) that face the same way only the tightest
counts; of equal ones only the first. Planes less than ``PARALLEL`` apart in angle count as parallel. The square root of
float64's epsilon balances what that neglects against the rounding of an ill-conditioned intersection line. Measured
against SciPy's half-space intersection, IoU is off by 1e-7 at worst (faces 1e-8 rad apart) and by 1e-12 at the
milliradians of rounded labels. pytorch3d's ``box3d_overlap`` drops or double-counts such faces (its issues 1429, 1771).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.boxes3d.transforms import rotation_matrix_torch

PARALLEL = 1.5e-8
"""Sine of the angle below which two planes, or two lines of one plane, are parallel."""

FAR = 16.0
"""Offset of the centres, in units of the largest side, beyond which it need not grow: the boxes are apart at 1.8."""

SMALLEST = 1e-60
"""Volume, in units of the largest side cubed, below which nothing is divided by it: the ratio could overflow."""


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Oriented IoU of box i of the one batch and box i of the other.

    Args:
        boxes_a: ``[n, 9]`` floating point (see ``boxes3d/transforms.py``), any one frame of reference.
        boxes_b: ``[n, 9]`` in the same frame of reference.

    Returns:
        ``[n]`` in [0, 1]; see ``oriented_iou``.
    """
    return oriented_iou(*box_parts(boxes_a, boxes_b)).to(result_dtype(boxes_a, boxes_b))


def oriented_iou(
    centre_a: Tensor, size_a: Tensor, rotation_a: Tensor, centre_b: Tensor, size_b: Tensor, rotation_b: Tensor
) -> Tensor:
    """Exact oriented IoU of n pairs of boxes, computed in float64.

    A pair with a size that is not positive, or with any number that is not finite, has IoU 0 and gradient 0. Where two
    faces coincide IoU has a kink; the gradient is then that of one side.

    Args:
        centre_a, centre_b: ``[n, 3]`` metres.
        size_a, size_b: ``[n, 3]`` metres, along the columns of the rotations.
        rotation_a, rotation_b: ``[n, 3, 3]`` rotations, box axes to the common frame of reference.

    Returns:
        ``[n]`` in [0, 1]; float64 where all inputs are, else float32.
    """
    given = (centre_a, size_a, rotation_a, centre_b, size_b, rotation_b)
    pairs = unit_pairs(*given)
    common = common_volume(pairs)
    return ratio(common, pairs.volumes - common, pairs.valid).to(result_dtype(*given))


@dataclass(frozen=True)
class Pairs:
    """n pairs of boxes in units of each pair's largest side, all float64.

    IoU and GIoU depend neither on the unit nor on the place, so the unit carries no gradient.

    Attributes:
        size_a, size_b: ``[n, 3]`` in (0, 1].
        rotation_a, rotation_b: ``[n, 3, 3]``.
        offset: ``[n, 3]`` from the first box's centre to the second's; may be infinite, so clamp it before use.
        valid: ``[n]`` bool, False where two far unit cubes stand in for a pair that is none.
    """

    size_a: Tensor
    size_b: Tensor
    rotation_a: Tensor
    rotation_b: Tensor
    offset: Tensor
    valid: Tensor

    @property
    def volumes(self) -> Tensor:
        """Sum of both volumes, ``[n]``."""
        return product(self.size_a) + product(self.size_b)


def unit_pairs(
    centre_a: Tensor, size_a: Tensor, rotation_a: Tensor, centre_b: Tensor, size_b: Tensor, rotation_b: Tensor
) -> Pairs:
    """``Pairs`` of ``oriented_iou``'s arguments."""
    given = (centre_a, size_a, rotation_a, centre_b, size_b, rotation_b)
    (centre_a, size_a, rotation_a, centre_b, size_b, rotation_b), valid = _only_valid(*(t.double() for t in given))
    scale = torch.maximum(size_a, size_b).amax(-1, keepdim=True).detach()
    # The difference first: two huge centres in units of a tiny side would be inf - inf.
    offset = (centre_b - centre_a) / scale
    return Pairs(size_a / scale, size_b / scale, rotation_a, rotation_b, offset, valid)


def common_volume(pairs: Pairs) -> Tensor:
    """Volume ``[n]`` of the intersection of each pair."""
    offset = pairs.offset.clamp(-FAR, FAR)
    normals_a, distances_a = _half_spaces(torch.zeros_like(offset), pairs.size_a, pairs.rotation_a)
    normals_b, distances_b = _half_spaces(offset, pairs.size_b, pairs.rotation_b)
    common = _volume(torch.cat((normals_a, normals_b), 1), torch.cat((distances_a, distances_b), 1))
    return torch.minimum(common.clamp(min=0.0), torch.minimum(product(pairs.size_a), product(pairs.size_b)))


def ratio(part: Tensor, whole: Tensor, valid: Tensor) -> Tensor:
    """``part / whole`` ``[n]``, 0 where not valid or where the whole vanishes (needles)."""
    valid = valid & (whole > SMALLEST)
    return torch.where(valid, part, 0.0) / torch.where(valid, whole, 1.0)


def product(sides: Tensor) -> Tensor:
    """``[..., 3]`` -> ``[...]``; unlike ``Tensor.prod``, its backward pass needs no host sync (to test for zeros)."""
    x, y, z = sides.unbind(-1)
    return x * y * z


def box_parts(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centre, size and rotation of both batches of ``[n, 9]`` boxes, float64: the arguments of ``oriented_iou``.

    Raises:
        ValueError: boxes of another shape.
    """
    for name, boxes in (("boxes_a", boxes_a), ("boxes_b", boxes_b)):
        if boxes.ndim != 2 or boxes.shape[-1] != 9:
            raise ValueError(f"{name} must have shape [n, 9], not {list(boxes.shape)}.")
    a, b = _only_finite(boxes_a.double()), _only_finite(boxes_b.double())
    turn_a, turn_b = rotation_matrix_torch(a[:, 6:]), rotation_matrix_torch(b[:, 6:])
    return a[:, :3], a[:, 3:6], turn_a, b[:, :3], b[:, 3:6], turn_b


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if all inputs are, else float32 (half precision is too coarse for the thresholds of Acc@k)."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _only_finite(boxes: Tensor) -> Tensor:
    """``[n, 9]`` with non-finite boxes replaced by -1: the gradients of sin and cos would be NaN."""
    return torch.where(boxes.isfinite().all(-1, keepdim=True), boxes, -1.0)


def _only_valid(*parts: Tensor) -> tuple[list[Tensor], Tensor]:
    """Swap invalid pairs for two far unit cubes, so that they can give neither a number nor a gradient that is NaN.

    Args:
        parts: centre, size, rotation of the first and of the second boxes.

    Returns:
        the same six tensors, and ``[n]`` bool, True where the pair was valid.
    """
    valid = (parts[1] > 0).all(-1) & (parts[4] > 0).all(-1)
    for part in parts:
        valid = valid & part.isfinite().flatten(1).all(-1)
    column = valid[:, None]
    eye = torch.eye(3, dtype=parts[2].dtype, device=parts[2].device)
    spares: tuple[Tensor | float, ...] = (0.0, 1.0, eye, FAR, 1.0, eye)
    swapped = [
        torch.where(column[..., None] if part.ndim == 3 else column, part, spare)
        for part, spare in zip(parts, spares, strict=True)
    ]
    return swapped, valid


def _half_spaces(centre: Tensor, size: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The six half-spaces ``n . x <= b`` of each box: unit normals ``[n, 6, 3]`` and distances ``[n, 6]``."""
    axes = rotation.transpose(1, 2)
    along = (axes @ centre[..., None]).squeeze(-1)
    return torch.cat((axes, -axes), 1), torch.cat((size / 2 + along, size / 2 - along), 1)


def _volume(normals: Tensor, distances: Tensor) -> Tensor:
    """Volume of ``{x : normals . x <= distances}``; bounded, unit normals ``[n, m, 3]``, distances ``[n, m]``."""
    count = normals.shape[1]
    cosine = normals @ normals.transpose(1, 2)
    first, second = _plane_axes(normals)
    lines = torch.stack((first @ normals.transpose(1, 2), second @ normals.transpose(1, 2)), dim=-1)
    parallel = lines.detach().square().sum(-1) < PARALLEL**2

    # The foot point of plane i is the origin of its own 2-D coordinates: plane k is there a half-plane m . y <= c.
    sine = torch.where(parallel[..., None], 1.0, lines).square().sum(-1).sqrt()
    half_planes = lines / sine[..., None]
    offsets = (distances[:, None, :] - distances[:, :, None] * cosine) / sine

    rival = distances.detach()
    hidden = _hidden(parallel, cosine, rival[:, :, None], rival[:, None, :], count)
    area = _areas(half_planes, offsets, ~parallel)
    return (distances * torch.where(hidden.any(-1), 0.0, area)).sum(-1) / 3


def _areas(normals: Tensor, offsets: Tensor, present: Tensor) -> Tensor:
    """Areas of the polygons ``{y : normals . y <= offsets}``.

    Args:
        normals: ``[n, m, m, 2]`` unit, of plane i's half-plane k.
        offsets: ``[n, m, m]``.
        present: ``[n, m, m]`` bool, False for a half-plane that is none (plane k is parallel to plane i).

    Returns:
        ``[n, m]``.
    """
    count = normals.shape[1]
    along = torch.stack((-normals[..., 1], normals[..., 0]), dim=-1)
    slope = along @ normals.transpose(-1, -2)  # [n, i, j, k]: how fast line j runs towards line k
    cosine = normals @ normals.transpose(-1, -2)
    parallel = slope.detach().abs() < PARALLEL
    bound = (offsets[..., None, :] - offsets[..., :, None] * cosine) / torch.where(parallel, 1.0, slope)

    cuts = present[..., None, :] & ~parallel
    upper = torch.where(cuts & (slope > 0), bound, torch.inf).amin(-1)
    lower = torch.where(cuts & (slope < 0), bound, -torch.inf).amax(-1)

    rival = offsets.detach()
    hidden = _hidden(parallel, cosine, rival[..., :, None], rival[..., None, :], count) & present[..., None, :]
    counts = present & ~hidden.any(-1) & (upper > lower)
    # Chosen before the subtraction: an unbounded line (inf - inf) must not reach the gradient.
    length = torch.where(counts, upper, 0.0) - torch.where(counts, lower, 0.0)
    return (torch.where(counts, offsets, 0.0) * length).sum(-1) / 2


def _hidden(parallel: Tensor, cosine: Tensor, own: Tensor, other: Tensor, count: int) -> Tensor:
    """Which parallel k hides j: faces the same way and is tighter (or equal and earlier), or leaves nothing between.

    Args:
        parallel, cosine: ``[..., j, k]``.
        own, other: the distances of j and of k along their normals, broadcastable to ``[..., j, k]``.
        count: number of j and of k.

    Returns:
        bool ``[..., j, k]``.
    """
    index = torch.arange(count, device=cosine.device)
    earlier = index[None, :] < index[:, None]
    same_way = cosine.detach() > 0
    tighter = (other < own) | ((other == own) & earlier)
    return parallel & torch.where(same_way, tighter, own + other < 0)


def _plane_axes(normals: Tensor) -> tuple[Tensor, Tensor]:
    """Two unit vectors ``[n, m, 3]`` that span the plane of each unit normal and form a right-handed frame with it.

    T. Duff et al., "Building an Orthonormal Basis, Revisited", JCGT 6(1), 2017: no case has a division by zero.
    """
    x, y, z = normals.unbind(-1)
    sign = torch.where(z < 0, -1.0, 1.0).to(normals.dtype)
    a = -1.0 / (sign + z)
    b = x * y * a
    first = torch.stack((1.0 + sign * x * x * a, sign * b, -sign * x), dim=-1)
    second = torch.stack((b, sign + y * y * a, -y), dim=-1)
    return first, second
