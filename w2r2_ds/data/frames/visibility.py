"""Who sees what: the frames of a scene in which an object is visible, and the clearest of them.

Two sources. EmbodiedScan lists the visible instances of every image (VG-LLM's source); it knows an object by a box of
its own, so the object is found by overlap (``match_instance``). Without it, the depth images tell (``frames.py``).
A *position* is an index into ``Scene.frames``; a frame's number in its file name is ``Frame.index``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.data.frames.projection import MIN_VISIBLE_SHARE, clipped_corners, hull_area, load_depth, visible_share
from w2r2_ds.data.sources.embodiedscan import InfoInstance, ScanInfo
from w2r2_ds.data.sources.scannet import Frame, Scene

MATCH_IOU = 0.5
"""IoU from which a ScanRefer object and an EmbodiedScan instance are the same object (VG-LLM)."""

POSE_TOLERANCE = 0.05
"""Metres between two poses of one image: only rounding differs, while the next image is often centimetres away."""


_RENUMBERED = "extract the images of the scan under their own numbers (every 10th: 00000, 00010, ...)"


def listed_frames(scene: Scene, info: ScanInfo) -> Scene:
    """The scene with only the frames that EmbodiedScan lists: the candidates of VG-LLM and of Video-3D-LLM.

    Of the other frames (where every frame of the scan was extracted) EmbodiedScan does not say what they see.

    Raises:
        ValueError: no listed frame is there, or a frame's pose is not the one that EmbodiedScan gives for its number.
    """
    frames = tuple(frame for frame in scene.frames if frame.index in info.visible)
    if not frames:
        raise ValueError(
            f"{scene.frames[0].color.parent}: none of its {len(scene.frames)} frames is among the {len(info.visible)} "
            f"that EmbodiedScan lists for {scene.scene_id}; {_RENUMBERED}"
        )
    for frame in frames:
        pose = info.axis_align @ info.poses[frame.index]
        distance = float(np.linalg.norm((pose - frame.cam_to_world)[:3, 3]))
        if distance > POSE_TOLERANCE:
            raise ValueError(
                f"{frame.color}: its camera is {distance:.2f} m from where EmbodiedScan has frame {frame.index} of "
                f"{scene.scene_id}; {_RENUMBERED}"
            )
    return replace(scene, frames=frames)


def match_instance(box: np.ndarray, info: ScanInfo) -> InfoInstance | None:
    """The EmbodiedScan instance that overlaps a ScanRefer box most, if their IoU is at least ``MATCH_IOU``.

    Args:
        box: ``[6]`` centre and size in the axis-aligned world, metres.
        info: its instances' boxes may be turned, the IoU is exact; of equal ones the first is taken.
    """
    if not info.instances:
        return None
    theirs = torch.from_numpy(np.stack([instance.box for instance in info.instances]).astype(np.float64))
    ours = torch.zeros(len(theirs), 9, dtype=torch.float64)
    ours[:, :6] = torch.from_numpy(np.asarray(box, dtype=np.float64))
    overlaps = box_iou(ours, theirs).numpy()
    best = int(overlaps.argmax())
    return info.instances[best] if overlaps[best] >= MATCH_IOU else None


def seen_by_infos(scene: Scene, info: ScanInfo, instance: InfoInstance) -> frozenset[int]:
    """Positions of the frames that see an instance according to EmbodiedScan.

    Args:
        scene: as ``listed_frames`` returns it.
        info: EmbodiedScan's record of the scene.
        instance: one of ``info.instances``; ``visible_instance_ids`` are indices into that list.
    """
    unlisted = [frame.index for frame in scene.frames if frame.index not in info.visible]
    assert not unlisted, f"{scene.scene_id}: EmbodiedScan does not list frame {unlisted[0]}; use listed_frames first"
    return frozenset(i for i, frame in enumerate(scene.frames) if instance.index in info.visible[frame.index])


def seen_by_depth(scene: Scene, boxes: Sequence[np.ndarray]) -> list[frozenset[int]]:
    """Positions of the frames that see each box, by ``visible_share`` of at least ``MIN_VISIBLE_SHARE``.

    All boxes of a scene are asked for at once: every depth image is read once, and one is in memory at a time.

    Args:
        scene: every frame's depth image is read.
        boxes: ``[6]`` each, centre and size in the axis-aligned world, metres.

    Returns:
        a set for each box.

    Raises:
        ValueError: a depth image is unreadable or of a wrong scale.
    """
    seen: list[set[int]] = [set() for _ in boxes]
    for position, frame in enumerate(scene.frames):
        depth = load_depth(frame)
        for box, positions in zip(boxes, seen, strict=True):
            if visible_share(box, frame.cam_to_world, scene.depth_intrinsic, depth) >= MIN_VISIBLE_SHARE:
                positions.add(position)
    return [frozenset(positions) for positions in seen]


def clearest(
    frames: Sequence[Frame],
    positions: Iterable[int],
    box: np.ndarray,
    intrinsic: np.ndarray,
    image_size: tuple[int, int],
) -> int | None:
    """The position whose frame shows a box largest (VG-LLM's target frame), by ``clear_area``.

    Args:
        frames: ``Scene.frames``.
        positions: those that see the object, in the order in which the model sees them; of equal ones the first wins.
        box: ``[6]`` or ``[9]``, world; VG-LLM takes EmbodiedScan's box here, though it asks for ScanRefer's.
        intrinsic: ``[4, 4]``, of the colour images.
        image_size: width and height of the colour images.

    Returns:
        one of ``positions``, or None if the area is 0 in all of them.
    """
    best, largest = None, 0.0
    for position in positions:
        area = clear_area(box, frames[position].cam_to_world, intrinsic, image_size)
        if area > largest:
            best, largest = position, area
    return best


def clear_area(box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]) -> float:
    """``projected_area``, but 0 where every corner lies left or right of the image, or every one above or below it.

    So VG-LLM counts: a box that fills the image from side to side is too close to be shown clearly.
    """
    pixels = clipped_corners(box, cam_to_world, intrinsic, image_size)
    at_border = (pixels == 0.0) | (pixels == np.array(image_size) - 1.0)
    return 0.0 if at_border.all(axis=0).any() else hull_area(pixels)
