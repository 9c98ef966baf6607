"""Cameras, depth and points from VGGT's heads: with gradients for training, or frozen as `VGGTPredictions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.models.vggt.cameras import decode_pose
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.dpt_head import DPTHead
from w2r2_ds.models.vggt.model import VGGT

FRAMES_AT_ONCE = 8
"""Frames of one call of a dense head in `predict`. Frames do not interact in it, and its full-size maps are large."""


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of all three heads for a batch of scenes, in the scale that the model was trained with.

    Attributes:
        pose_encodings: ``[iterations, B, S, 9]`` (`models/vggt/cameras.py`); the last one is the prediction.
        depth: ``[B, S, H, W]``, above 0. This and the following maps have only the chosen frames of `run_heads`.
        depth_confidence: ``[B, S, H, W]``, above 1.
        points: ``[B, S, H, W, 3]``, in the frame of the first camera.
        point_confidence: ``[B, S, H, W]``, above 1.
    """

    pose_encodings: Tensor
    depth: Tensor
    depth_confidence: Tensor
    points: Tensor
    point_confidence: Tensor


@dataclass(frozen=True)
class VGGTPredictions:
    """Cameras, depth and points of the frames of one scene.

    There is no metric scale: lengths are in units of the mean distance of the scene's points from the first camera, as
    far as the model has learned it. The first frame's camera is the world (x right, y down, z forward), and its own
    predicted transform is close to the identity. `points` and the points of `depth` and the cameras (`unproject_depth`)
    are two predictions of the same points; the paper found the second one more accurate (Table 3).

    Attributes:
        intrinsics: ``[frames, 3, 3]`` in pixels; the principal point is the centre of the image.
        world_to_camera: ``[frames, 3, 4]``.
        depth: ``[frames, H, W]``, z coordinates in each camera's frame.
        depth_confidence: ``[frames, H, W]``, above 1.
        points: ``[frames, H, W, 3]`` in the world.
        point_confidence: ``[frames, H, W]``, above 1.
    """

    intrinsics: Tensor
    world_to_camera: Tensor
    depth: Tensor
    depth_confidence: Tensor
    points: Tensor
    point_confidence: Tensor


def run_heads(
    vggt: VGGT, images: Tensor, frames_at_once: int | None = None, dense_frames: Sequence[int] | None = None
) -> HeadOutputs:
    """Run the aggregator and all three heads, with gradients if they are enabled.

    The heads run in the dtype of their own weights, which may be float32 beside an aggregator in bfloat16.

    Args:
        vggt: a model with all heads.
        images: ``[B, S, 3, H, W]`` floating, RGB in [0, 1]; frame 0 is the reference. H and W are multiples of the
            patch size.
        frames_at_once: frames of one call of a dense head; all by default.
        dense_frames: indices of the frames for depth and points; all by default. Fewer make training steps shorter:
            the dense heads cost as much as the aggregator in a small model, and frames do not interact in them.

    Raises:
        ValueError: the model lacks a head, or see `Aggregator.forward`.
    """
    camera_head, depth_head, point_head = vggt.camera_head, vggt.depth_head, vggt.point_head
    if camera_head is None or depth_head is None or point_head is None:
        raise ValueError(
            f"This VGGT has the heads {list(vggt.heads)}, but {', '.join(HEADS)} are needed; load it with "
            "load_vggt(path, heads=HEADS)."
        )
    config = vggt.config
    by_layer = vggt.aggregator(images, sorted({*config.dpt_layers, config.depth - 1}))
    chosen = slice(None) if dense_frames is None else list(dense_frames)  # a list is copied to the device
    taps = [by_layer[layer][:, chosen, config.special_tokens :].flatten(0, 1) for layer in config.dpt_layers]
    camera_tokens = by_layer[config.depth - 1][:, :, 0].to(camera_head.token_norm.weight.dtype)

    def dense(head: DPTHead) -> tuple[Tensor, Tensor]:
        values, confidence = run_dense_head(head, taps, images.shape[-2:], frames_at_once)
        return values.unflatten(0, (len(images), -1)), confidence.unflatten(0, (len(images), -1))

    depth, depth_confidence = dense(depth_head)
    points, point_confidence = dense(point_head)
    return HeadOutputs(camera_head(camera_tokens), depth[..., 0], depth_confidence, points, point_confidence)


def run_dense_head(
    head: DPTHead, taps: Sequence[Tensor], size: Sequence[int], frames_at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run a dense head: values ``[frames, H, W, outputs]`` and confidence ``[frames, H, W]``, in its weights' dtype.

    Args:
        head: the depth head or the point head.
        taps: four tensors ``[frames, patches, 2 * embed_dim]``, the patch tokens of `VGGTConfig.dpt_layers`.
        size: height and width of the frames in pixels.
        frames_at_once: frames of one call of the head; all by default.
    """
    chunks = zip(*(tap.to(head.norm.weight.dtype).split(frames_at_once or len(tap)) for tap in taps), strict=True)
    height, width = size
    values, confidence = zip(*(head(chunk, height, width) for chunk in chunks), strict=True)
    return torch.cat(values), torch.cat(confidence)


@torch.no_grad()
def predict(vggt: VGGT, images: Tensor) -> VGGTPredictions:
    """Cameras, depth and points of the frames of one scene, without gradient, on the device of `images`.

    Args:
        vggt: a model with all heads, from ``load_vggt(path, heads=HEADS)``.
        images: ``[frames, 3, H, W]`` floating, RGB in [0, 1], on the device of the weights; the first frame is the
            reference. H and W are multiples of the patch size.

    Raises:
        ValueError: the model lacks a head, or the images have a wrong shape, size or dtype.
    """
    outputs = run_heads(vggt, images[None], FRAMES_AT_ONCE)
    intrinsics, world_to_camera = decode_pose(outputs.pose_encodings[-1, 0], *images.shape[-2:])
    return VGGTPredictions(
        intrinsics=intrinsics,
        world_to_camera=world_to_camera,
        depth=outputs.depth[0],
        depth_confidence=outputs.depth_confidence[0],
        points=outputs.points[0],
        point_confidence=outputs.point_confidence[0],
    )
