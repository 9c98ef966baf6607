"""Auxiliary losses for the pretraining of a tiny VGGT; their heads are dropped afterwards.

VGGT is trained with point tracks too. Here, patches that show the same place in two frames get similar descriptors, and
the camera token of a frame predicts the heading relative to the walls. Both are needed to find the relative pose of two
cameras, and both are computed from the first frame block, before frames attend to each other. The camera tokens of the
last layer predict the relative pose of every pair of frames, not only of those with the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from w2r2_ds.demo.pretraining.vggt.room_views import ViewBatch
from w2r2_ds.models.vggt.cameras import camera_to_world, encode_pose
from w2r2_ds.models.vggt.layers import MLP
from w2r2_ds.models.vggt.losses import VGGTTargets, camera_loss
from w2r2_ds.models.vggt.model import VGGT

POSE = 7
"""Numbers of a relative pose: translation and quaternion."""
DESCRIPTOR = 64
"""Channels of a descriptor."""
TEMPERATURE = 0.1
"""Of the similarities of descriptors."""
SAME_PLACE = 0.15
"""Standard deviation, in metres, of the weight of two patches by the distance of their centres."""


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Scalars: descriptors, headings, and relative poses of pairs of frames."""

    matching: Tensor
    heading: Tensor
    pairs: Tensor


class Auxiliary(nn.Module):
    """Heads on the output of the first frame block and of the last layer.

    Args:
        vggt: the model; every forward pass of it updates the inputs of these heads.
    """

    def __init__(self, vggt: VGGT) -> None:
        super().__init__()
        dim = vggt.config.embed_dim
        self.size, self.special = vggt.config.patch_size, vggt.config.special_tokens
        self.descriptor = nn.Linear(dim, DESCRIPTOR)
        self.heading = nn.Linear(dim, 3)
        self.pair = MLP(4 * dim, 2 * dim, POSE)
        self._tokens: dict[str, Tensor] = {}
        blocks = vggt.aggregator.frame_blocks
        blocks[0].register_forward_hook(self._keep("first"))
        blocks[-1].register_forward_hook(self._keep("frame"))
        vggt.aggregator.global_blocks[-1].register_forward_hook(self._keep("global"))

    def _keep(self, name: str) -> Any:
        """A hook that stores the output of a block."""

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._tokens[name] = output

        return keep

    def forward(self, batch: ViewBatch, targets: VGGTTargets) -> AuxiliaryLosses:
        """Losses after a forward pass of the model on `batch`."""
        scenes, frames = batch.images.shape[:2]
        first, within = (self._tokens[name].unflatten(0, (scenes, frames)) for name in ("first", "frame"))
        across = self._tokens["global"].unflatten(1, (frames, -1))
        centre = slice(self.size // 2, None, self.size)
        places = (targets.points[:, :, centre, centre] * targets.scale[:, None, None, None, None]).flatten(2, 3)
        # Rows 2 of the rotation: the viewing direction in the world, whose axes are those of the walls.
        forward = batch.world_to_camera[..., 2, :3]
        cameras = torch.cat((within[:, :, 0], across[:, :, 0]), dim=-1)
        ordered = torch.cat(
            (cameras[:, :, None].expand(-1, -1, frames, -1), cameras[:, None].expand(-1, frames, -1, -1)), dim=-1
        )
        return AuxiliaryLosses(
            matching_loss(self.descriptor(first[:, :, self.special :]), places),
            heading_loss(self.heading(first[:, :, 0]), forward),
            pair_loss(self.pair(ordered), batch, targets.scale),
        )


def matching_loss(descriptors: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of the patch of another frame that shows the same place, over all pairs of frames.

    Args:
        descriptors: ``[B, S, patches, channels]``.
        places: ``[B, S, patches, 3]``, the point at each patch's centre, metres.

    Returns:
        Mean over the patches whose place another frame shows.
    """
    unit = nn.functional.normalize(descriptors, dim=-1)
    # [B, S, S, patches, patches]: frame, other frame, patch, patch of the other frame.
    similarity = unit[:, :, None] @ unit[:, None].mT / TEMPERATURE
    distance = torch.cdist(places[:, :, None], places[:, None])
    weight = torch.exp(-0.5 * (distance / SAME_PLACE).square())
    frames = places.shape[1]
    other = ~torch.eye(frames, dtype=torch.bool, device=places.device)[None, :, :, None]
    seen = (distance.amin(-1) < 2 * SAME_PLACE) & other
    target = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    loss = -(target * similarity.log_softmax(-1)).sum(-1)
    return torch.where(seen, loss, 0).sum() / seen.sum().clamp(min=1)


def heading_loss(predicted: Tensor, forward: Tensor) -> Tensor:
    """Squared error of the heading relative to the nearest wall, as sine and cosine of four times it, and of the pitch.

    Args:
        predicted: ``[..., 3]``.
        forward: ``[..., 3]`` viewing direction in a world whose axes are those of the walls.
    """
    angle = 4 * torch.atan2(forward[..., 1], forward[..., 0])
    target = torch.stack((angle.sin(), angle.cos(), 4 * forward[..., 2]), dim=-1)
    return (predicted - target).square().mean()


def pair_loss(predicted: Tensor, batch: ViewBatch, scale: Tensor) -> Tensor:
    """The camera loss of relative poses.

    Args:
        predicted: ``[B, S, S, 7]``: transform from the camera of the first frame of a pair to that of the second.
        batch: views.
        scale: ``[B]``, unit of translations, metres.
    """
    cameras = batch.world_to_camera
    relative = cameras[:, None] @ camera_to_world(cameras)[:, :, None]
    height, width = batch.images.shape[-2:]
    intrinsics = batch.intrinsics[:, None].expand(*relative.shape[:3], 3, 3)
    target = encode_pose(intrinsics, relative, height, width)[..., :POSE]
    sign = torch.where((target[..., 3:] * predicted[..., 3:]).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    target = torch.cat((target[..., :3] / scale[:, None, None, None], sign * target[..., 3:]), dim=-1)
    return camera_loss(predicted[None], target)
