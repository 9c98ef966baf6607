"""`VGGTConfig`: sizes of a VGGT, and the fields of ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, Strict, ValidationError
from pydantic.dataclasses import dataclass

VIT_LARGE = "dinov2_vitl14_reg"
"""The public code's value of `patch_embed` for the 1B model; the same as ``dinov2`` with the default sizes."""
Head = Literal["camera", "depth", "point"]
HEADS: tuple[Head, ...] = ("camera", "depth", "point")
"""Heads that can be built, as ``camera_head``, ``depth_head`` and ``point_head``."""
HEAD_SWITCHES = ("enable_camera", "enable_depth", "enable_point", "enable_track")
"""Fields of the public code's configuration for the heads that the weights contain."""
HEAD_SIZES = ("camera_trunk_depth", "camera_num_heads", "dpt_features", "dpt_out_channels", "dpt_layers")
"""Fields of `VGGTConfig` that describe heads only."""
BLOCK_ORDER = {"aa_order": ["frame", "global"], "aa_block_size": 1}
"""Fields of the public code's configuration for the order of the blocks, and their only supported values."""

Four = Annotated[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt], Strict(False)]
"""Four numbers; the list of a JSON file becomes a tuple."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class VGGTConfig:
    """Sizes of a VGGT; the defaults are those of the public 1B model.

    Attributes:
        img_size: side in pixels of the square images of the ViT's learned position table.
        patch_size: side of a patch in pixels; height and width of a frame must be multiples of it.
        embed_dim: width of a token; a feature has twice as many channels.
        depth: number of layers, each of one frame block and one global block.
        num_heads: attention heads of the frame and global blocks.
        mlp_ratio: hidden width of their MLPs divided by `embed_dim`.
        num_register_tokens: register tokens per frame, in the aggregator and in the ViT.
        qk_norm: LayerNorm on queries and keys of the frame and global blocks.
        rope_freq: base of their rotary position embeddings; 0 for none.
        patch_embed: ``"dinov2"`` (a ViT) or ``"conv"`` (one convolution).
        vit_depth: transformer blocks of the ViT.
        vit_num_heads: its attention heads.
        vit_mlp_ratio: hidden width of its MLPs divided by `embed_dim`.
        camera_trunk_depth: transformer blocks of the camera head.
        camera_num_heads: their attention heads.
        dpt_features: channels of the fused maps in the depth head and in the point head.
        dpt_out_channels: channels of their four maps before fusion.
        dpt_layers: the layers whose patch tokens become these maps, from the finest map to the coarsest.
    """

    img_size: PositiveInt = 518
    patch_size: PositiveInt = 14
    embed_dim: PositiveInt = 1024
    depth: PositiveInt = 24
    num_heads: PositiveInt = 16
    mlp_ratio: NonNegativeFloat = 4.0
    num_register_tokens: NonNegativeInt = 4
    qk_norm: bool = True
    rope_freq: NonNegativeFloat = 100
    patch_embed: Literal["dinov2", "conv"] = "dinov2"
    vit_depth: PositiveInt = 24
    vit_num_heads: PositiveInt = 16
    vit_mlp_ratio: NonNegativeFloat = 4.0
    camera_trunk_depth: PositiveInt = 4
    camera_num_heads: PositiveInt = 16
    dpt_features: PositiveInt = 256
    dpt_out_channels: Four = (256, 512, 1024, 1024)
    dpt_layers: Four = (4, 11, 17, 23)

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 4 * num_heads = {4 * self.num_heads}")
        if self.patch_embed == "dinov2" and self.embed_dim % self.vit_num_heads:
            raise ValueError(f"vit_num_heads {self.vit_num_heads} must divide embed_dim {self.embed_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VGGTConfig:
        """Make a configuration from the fields of a ``config.json``; missing fields have the values of the 1B model.

        The switches of heads (`HEAD_SWITCHES`) are ignored, and the public code's name of the ViT is replaced by
        ``dinov2``.

        Raises:
            ValueError: a field is unknown, or a value is out of range.
        """
        fields = {key: value for key, value in values.items() if key not in HEAD_SWITCHES}
        for key, supported in BLOCK_ORDER.items():
            if fields.pop(key, supported) != supported:
                raise ValueError(f"VGGT config: {key} is {values[key]!r}; only {supported!r} is supported.")
        if fields.get("patch_embed") == VIT_LARGE:
            fields["patch_embed"] = "dinov2"
        try:
            return cls(**fields)
        except ValidationError as failure:
            error = failure.errors()[0]
            field = "".join(f"{name!r}: " for name in error["loc"])
            raise ValueError(f"VGGT config: {field}{error['msg']}.") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    def check_heads(self) -> None:
        """Check the sizes of heads, which need not be valid where no head is built.

        Raises:
            ValueError: a size does not fit the aggregator, or channels are not multiples of 4 (8 for `dpt_features`).
        """
        if (2 * self.embed_dim) % self.camera_num_heads:
            raise ValueError(
                f"VGGT config: camera_num_heads {self.camera_num_heads} must divide 2 * embed_dim = "
                f"{2 * self.embed_dim}."
            )
        if max(self.dpt_layers) >= self.depth:
            raise ValueError(f"VGGT config: dpt_layers is {self.dpt_layers}; there are layers 0 to {self.depth - 1}.")
        if self.dpt_features % 8 or any(not channels or channels % 4 for channels in self.dpt_out_channels):
            raise ValueError(
                f"VGGT config: dpt_features is {self.dpt_features}, dpt_out_channels is {self.dpt_out_channels}; give "
                "multiples of 8 and of 4."
            )

    @property
    def special_tokens(self) -> int:
        """Number of tokens before the patches of a frame: one camera token and the registers."""
        return 1 + self.num_register_tokens
