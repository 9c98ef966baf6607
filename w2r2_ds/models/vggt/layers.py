"""Layers of VGGT: attention with 2D rotary position embeddings, MLP, LayerScale, pre-norm block, patch projection.

Parameters have the names of the public checkpoint (``attn.qkv``, ``ls1.gamma``, ``mlp.fc1``, ...).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

RotaryTable = tuple[torch.Tensor, torch.Tensor]
"""``(cos, sin)``, each ``[..., tokens, 2, head_dim / 4]`` float32; the dimension of size 2 is (row, column)."""


def grid_positions(rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """``(row, column)`` of every cell of a grid, ``[rows * columns, 2]`` int64, row-major, starting at (0, 0)."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def rotary_table(positions: torch.Tensor, head_dim: int, base: float) -> RotaryTable:
    """Cosines and sines of the angles of 2D rotary position embeddings (RoPE), always in float32.

    The first half of a head's channels encodes the row, the second half the column. In a half of ``d = head_dim / 2``
    channels, the pair of channels ``i`` and ``i + d / 2`` is rotated by the angle ``position * base ** (-2 i / d)``.

    Args:
        positions: ``[..., tokens, 2]`` integer ``(row, column)``.
        head_dim: channels of a head, a multiple of 4.
        base: base of the geometric series of frequencies.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = positions.to(torch.float32)[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate every pair of channels of `x` by the angle of its position.

    Args:
        x: ``[..., tokens, head_dim]``, any floating dtype.
        table: result of `rotary_table`; its leading dimensions broadcast to those of `x`.

    Returns:
        ``[..., tokens, head_dim]`` float32 (float64 for float64 input).
    """
    cos, sin = table
    # [..., tokens, (row, column), (first, second of a pair), head_dim / 4]
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


class Attention(nn.Module):
    """Multi-head self-attention without a mask.

    Args:
        dim: width of a token.
        num_heads: attention heads; must divide `dim`.
        qk_norm: LayerNorm with bias on queries and keys of each head, before the rotary positions.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rope: RotaryTable | None = None) -> torch.Tensor:
        """``[batch, tokens, dim]`` -> same shape; `rope` broadcasts to ``[batch, heads, tokens, 2, head_dim / 4]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Each [batch, heads, tokens, head_dim].
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # `rotate` returns float32; attention runs in the dtype of the values.
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (exact, not the tanh approximation), Linear.

    Args:
        dim: width of the input.
        hidden: width after the first linear layer.
        out: width of the output; `dim` by default.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., dim]`` -> ``[..., out]``."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiplication by a learned factor per channel (H. Touvron et al., arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., dim]`` -> the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: ``x += ls1(attn(norm1(x)))``, then ``x += ls2(mlp(norm2(x)))``.

    Args:
        dim: width of a token.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP divided by `dim`.
        eps: epsilon of the two LayerNorms.
        initial_scale: initial value of both LayerScales.
        qk_norm: see `Attention`.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, *, eps: float, initial_scale: float, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, initial_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, initial_scale)

    def forward(self, x: torch.Tensor, rope: RotaryTable | None = None) -> torch.Tensor:
        """``[batch, tokens, dim]`` -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchProjection(nn.Module):
    """Linear projection of non-overlapping image patches to tokens, as a convolution.

    Args:
        patch_size: side of a patch in pixels.
        dim: width of a token.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[N, 3, H, W]`` -> ``[N, (H / patch) * (W / patch), dim]``, row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)
