"""DINOv2 with registers, the ViT of VGGT's patch embedding.

M. Oquab et al., "DINOv2", arXiv 2304.07193; T. Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from w2r2_ds.models.vggt.layers import Block, PatchProjection

EPS = 1e-6


def resample_position_table(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Interpolate a learned, square position table to another grid of patches (bicubic, antialiased, in float32).

    Args:
        table: ``[1, 1 + side * side, dim]``, class token first, then a row-major square grid.
        rows: number of patches from top to bottom.
        columns: number of patches from left to right.

    Returns:
        ``[1, 1 + rows * columns, dim]`` in the table's dtype; the class token's entry is unchanged.
    """
    side = math.isqrt(table.shape[1] - 1)
    if rows == columns == side:
        return table
    square = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    fitted = F.interpolate(square, size=(rows, columns), mode="bicubic", antialias=True)
    return torch.cat((table[:, :1], fitted.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class DinoViT(nn.Module):
    """ViT with a class token and registers, without rotary positions and query/key norm.

    Args:
        img_size: side in pixels of the square images of the learned position table.
        patch_size: side of a patch in pixels.
        dim: width of a token.
        depth: number of transformer blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs divided by `dim`.
        num_registers: number of register tokens.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_registers: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_registers = num_registers
        self.patch_embed = PatchProjection(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, dim))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, dim))
        # Replaces masked patches in DINOv2's pre-training. Not used here, but a weight of the public checkpoint.
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, eps=EPS, initial_scale=1.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Class token, registers and patch tokens (row-major) after the last norm.

        Args:
            images: ``[N, 3, H, W]``, normalised by mean and standard deviation.

        Returns:
            ``[N, 1 + registers + patches, dim]``.
        """
        count, _, height, width = images.shape
        patches = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(count, -1, -1), patches), dim=1)
        x = x + resample_position_table(self.pos_embed, height // self.patch_size, width // self.patch_size)
        if self.num_registers:  # after the positions are added: registers have none
            x = torch.cat((x[:, :1], self.register_tokens.expand(count, -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Patch tokens ``[N, patches, dim]`` of normalised `images` ``[N, 3, H, W]``."""
        return self.tokens(images)[:, 1 + self.num_registers :]
