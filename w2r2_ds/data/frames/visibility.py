"""Object visibility: the frames of a scene in which an object is visible, and the frame that shows it largest.

There are two sources of visibility. EmbodiedScan lists the visible instances of every image (VG-LLM's source); its
boxes differ from ScanRefer's, so an object is matched to an instance by IoU (`match_instance`). Without EmbodiedScan,
the depth images are compared with the object's box (``projection.py``).

A *position* is an index into ``Scene.frames``; the number in a frame's file name is ``Frame.index``. Boxes are in the
axis-aligned world: ``[6]`` (centre, size) or ``[9]`` (with ZXY angles); metres, radians.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from w2r2_ds.data.frames.projection import (
    MIN_VISIBLE_FRACTION,
    clipped_corners,
    hull_area,
    load_depth,
    visible_fraction,
)
from w2r2_ds.data.sources.embodiedscan import InfoInstance, ScanInfo
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.scannet import Scene

MATCH_IOU = 0.5
"""Smallest IoU at which a ScanRefer object and an EmbodiedScan instance count as the same object (VG-LLM)."""

POSE_TOLERANCE = 0.05
"""Largest distance in metres between a frame's camera centre and EmbodiedScan's camera centre of that frame number.

Both files round the same pose. A larger distance means that the frame has the number of another image. The tolerance is
small because neighbouring images are often only centimetres apart.
"""

_RENUMBERED = "extract the images of the scan under their own numbers (every 10th: 00000, 00010, ...)"
_REALIGNED = (
    "axisAlignment in scans/{scene}/{scene}.txt is missing or differs from EmbodiedScan's; copy that file again"
)


def keep_listed_frames(scene: Scene, info: ScanInfo) -> Scene:
    """The scene restricted to the frames that EmbodiedScan lists, from which VG-LLM and Video-3D-LLM also sample.

    EmbodiedScan lists every tenth image of a scan. If more were extracted, it has no visibility for the others.

    Raises:
        ValueError: the scene has none of the listed frames, or a pose differs from EmbodiedScan's for that number.
    """
    frames = tuple(frame for frame in scene.frames if frame.index in info.visible)
    if not frames:
        raise ValueError(
            f"{scene.frames[0].color.parent}: none of its {len(scene.frames)} frames is among the {len(info.visible)} "
            f"that EmbodiedScan lists for {scene.scene_id}; {_RENUMBERED}"
        )
    for frame in frames:
        # EmbodiedScan's poses are in the raw world; move them to the axis-aligned world of the frames.
        pose = info.axis_align @ info.poses[frame.index]
        distance = float(np.linalg.norm((pose - frame.cam_to_world)[:3, 3]))
        if distance > POSE_TOLERANCE:
            # Detection accepts a scan without axisAlignment, whose world is then the raw one.
            same_world = np.allclose(scene.axis_align, info.axis_align, atol=POSE_TOLERANCE)
            raise ValueError(
                f"{frame.color}: its camera is {distance:.2f} m from where EmbodiedScan has frame {frame.index} of "
                f"{scene.scene_id}; {_RENUMBERED if same_world else _REALIGNED.format(scene=scene.scene_id)}"
            )
    return replace(scene, frames=frames)


def match_instance(box: np.ndarray, info: ScanInfo) -> InfoInstance | None:
    """The EmbodiedScan instance with the largest IoU with a ScanRefer box; None if that is below ``MATCH_IOU``.

    Of several instances with the same IoU, the first is returned.

    Args:
        box: ``[6]`` axis-aligned ScanRefer box.
        info: EmbodiedScan's annotations of the scene, with oriented boxes.
    """
    if not info.instances:
        return None
    import torch  # not at the top: `--help` of a command must not wait for it

    from w2r2_ds.boxes3d.iou import box_iou

    candidates = list(info.instances.values())
    instances = torch.from_numpy(np.stack([instance.box for instance in candidates]).astype(np.float64))
    # The same box for every pair; its angles are 0.
    repeated = torch.zeros(len(instances), 9, dtype=torch.float64)
    repeated[:, :6] = torch.from_numpy(np.asarray(box, dtype=np.float64))
    ious = box_iou(repeated, instances).numpy()
    best = int(ious.argmax())
    return candidates[best] if ious[best] >= MATCH_IOU else None


def visible_frames_by_infos(scene: Scene, info: ScanInfo, instance: InfoInstance) -> frozenset[int]:
    """Positions of the frames in which EmbodiedScan lists an instance as visible.

    Args:
        scene: scene with listed frames only, see `keep_listed_frames`.
        info: EmbodiedScan's annotations of the scene.
        instance: one of ``info.instances``.
    """
    unlisted = [frame.index for frame in scene.frames if frame.index not in info.visible]
    assert not unlisted, f"{scene.scene_id}: frame {unlisted[0]} is not listed; call keep_listed_frames first"
    return frozenset(i for i, frame in enumerate(scene.frames) if instance.index in info.visible[frame.index])


def visible_frames_by_depth(scene: Scene, boxes: Sequence[np.ndarray]) -> list[frozenset[int]]:
    """Positions of the frames in which each box has a `visible_fraction` of at least ``MIN_VISIBLE_FRACTION``.

    Args:
        scene: scene whose depth images are read, each once; one is in memory at a time.
        boxes: axis-aligned boxes, ``[6]`` each.

    Returns:
        One set of positions per box.

    Raises:
        ValueError: a depth image is unreadable or not in millimetres.
    """
    # Frames in the outer loop, so that each depth image is decoded once for all boxes.
    visible: list[set[int]] = [set() for _ in boxes]
    for position, frame in enumerate(scene.frames):
        depth = load_depth(frame)
        for box, positions in zip(boxes, visible, strict=True):
            if visible_fraction(box, frame.cam_to_world, scene.depth_intrinsic, depth) >= MIN_VISIBLE_FRACTION:
                positions.add(position)
    return [frozenset(positions) for positions in visible]


def clearest_frame(
    frames: Sequence[Frame],
    positions: Iterable[int],
    box: np.ndarray,
    intrinsic: np.ndarray,
    image_size: tuple[int, int],
) -> int | None:
    """Position of the frame that shows a box with the largest `clear_area`: VG-LLM's target frame.

    Of several frames with the same area, the first is returned.

    Args:
        frames: frames of the scene (``Scene.frames``).
        positions: positions of the frames in which the object is visible, in the order of the model's input.
        box: ``[6]`` or ``[9]``. VG-LLM uses EmbodiedScan's box here, but ScanRefer's in the answer.
        intrinsic: ``[4, 4]`` pinhole matrix of the colour images, pixels.
        image_size: width and height of the colour images, pixels.

    Returns:
        One of ``positions``, or None if all areas are 0.
    """
    best, largest = None, 0.0
    for position in positions:
        area = clear_area(box, frames[position].cam_to_world, intrinsic, image_size)
        if area > largest:
            best, largest = position, area
    return best


def clear_area(box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]) -> float:
    """`projected_area`, but 0 if every corner lies left or right of the image, or every corner above or below it.

    VG-LLM's rule: such a box fills the image from side to side and is too close to be shown clearly.
    """
    pixels = clipped_corners(box, cam_to_world, intrinsic, image_size)
    # corners outside the image were clipped to its border
    at_border = (pixels == 0.0) | (pixels == np.array(image_size) - 1.0)
    return 0.0 if at_border.all(axis=0).any() else hull_area(pixels)
