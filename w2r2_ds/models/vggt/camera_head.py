"""VGGT's camera head: pose encodings of all frames, from their camera tokens (section 3.3 of arXiv 2503.11651).

A pose encoding is refined in several iterations. Each one modulates the camera tokens by the current encoding with
adaptive LayerNorm (W. Peebles and S. Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748), lets all
frames attend to each other, and adds an update to the encoding. Parameters have the names of the public checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2r2_ds.models.vggt.cameras import POSE_SIZE
from w2r2_ds.models.vggt.layers import MLP, Block

ITERATIONS = 4


class CameraHead(nn.Module):
    """Iterative refinement of pose encodings (`models/vggt/cameras.py`).

    Args:
        dim: width of an output token of the aggregator.
        depth: transformer blocks of the trunk, which every iteration runs.
        num_heads: attention heads of the trunk.
    """

    def __init__(self, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim, eps=1e-5)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.ModuleList(Block(dim, num_heads, 4.0, eps=1e-5, initial_scale=0.01) for _ in range(depth))
        self.trunk_norm = nn.LayerNorm(dim, eps=1e-5)
        self.pose_branch = MLP(dim, dim // 2, POSE_SIZE)
        # Training starts near the first camera with a field of view of 1 rad: no translation, quaternion (0, 0, 0, 1).
        # A field of view that started below 0 would get no gradient through the ReLU.
        with torch.no_grad():
            self.pose_branch.fc2.weight.mul_(0.1)
            self.pose_branch.fc2.bias.copy_(torch.tensor([0.0] * 6 + [1.0 / ITERATIONS] * 3))

    def modulated_norm(self, tokens: Tensor) -> Tensor:
        """LayerNorm without weights, whose scale and shift come from the current encoding."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)

    def forward(self, camera_tokens: Tensor) -> Tensor:
        """Pose encodings after every iteration.

        Args:
            camera_tokens: ``[B, S, dim]``, token 0 of every frame in the output of the aggregator's last layer.

        Returns:
            ``[iterations, B, S, 9]``; the last one is the prediction. Fields of view are not negative.
        """
        tokens = self.token_norm(camera_tokens)
        normalised = self.modulated_norm(tokens)
        encoding: Tensor | None = None
        outputs = []
        for _ in range(ITERATIONS):
            # No gradient flows from one iteration to an earlier one. The fed-back value is the one before the ReLU.
            current = None if encoding is None else encoding.detach()
            condition = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if current is None else current
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(condition)).chunk(3, dim=-1)
            x = tokens + gate * (normalised * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            update = self.pose_branch(self.trunk_norm(x))
            encoding = update if current is None else current + update
            outputs.append(torch.cat((encoding[..., :7], encoding[..., 7:].relu()), dim=-1))
        return torch.stack(outputs)
