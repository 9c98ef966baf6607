"""Geometry encoders: frames of one scene -> a grid of features per frame."""

from __future__ import annotations

from typing import Protocol

import torch

from w2r2_ds.models.vggt.model import VGGT

REFERENCE_FRAMES = ("first", "last")


class GeometryEncoder(Protocol):
    """Whatever sees the frames of one scene together and answers with features that know about space."""

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        ...

    @property
    def layer(self) -> int:
        """Layer that the features come from."""
        ...

    @property
    def reference_frame(self) -> str:
        """Frame that the others are seen relative to, one of `REFERENCE_FRAMES`."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """``[S, 3, H, W]`` in [0, 1], frames of one scene in order -> ``[S, h, w, feature_dim]``, no gradient."""
        ...


class VGGTEncoder:
    """Patch tokens of one layer of a frozen VGGT.

    Deliberately no `nn.Module`: kept as an attribute of a model, it is neither sharded, trained nor saved with it.

    Args:
        vggt: is put into eval mode and frozen.
        layer: absolute index of the layer, ``0 .. depth - 1``.
        reference_frame: ``"first"``, or ``"last"``: VGGT sees the frames in reverse, features come back in their order.

    Raises:
        ValueError: no such layer or reference frame.
    """

    def __init__(self, vggt: VGGT, layer: int, reference_frame: str = "first") -> None:
        depth = vggt.config.depth
        if not 0 <= layer < depth:
            raise ValueError(f"geometry layer {layer} does not exist; this VGGT has layers 0 to {depth - 1}.")
        if reference_frame not in REFERENCE_FRAMES:
            raise ValueError(f"reference_frame is {reference_frame!r}; it is one of {', '.join(REFERENCE_FRAMES)}.")
        self.vggt = vggt.eval().requires_grad_(False)
        self.layer = layer
        self.reference_frame = reference_frame

    @property
    def feature_dim(self) -> int:
        """Channels of a feature: the frame block's and the global block's."""
        return 2 * self.vggt.config.embed_dim

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> VGGTEncoder:
        """Move the weights, in place; returns itself."""
        self.vggt.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features of the frames of one scene.

        Args:
            images: ``[S, 3, H, W]`` floating in [0, 1], any device.

        Returns:
            ``[S, H / patch, W / patch, feature_dim]`` on the device and in the dtype of the weights.

        Raises:
            ValueError: images of a wrong shape, or of a size that is no multiple of the patch size.
        """
        if images.dim() != 4:
            raise ValueError(f"VGGT: images have shape {tuple(images.shape)}; give [frames, 3, height, width].")
        config, aggregator = self.vggt.config, self.vggt.aggregator
        images = images.to(aggregator.camera_token.device)
        backwards = self.reference_frame == "last"  # VGGT itself takes frame 0 as the reference
        tokens = aggregator((images.flip(0) if backwards else images)[None], [self.layer])[self.layer][0]
        rows = images.shape[-2] // config.patch_size
        grid = tokens[:, config.special_tokens :].unflatten(1, (rows, -1))
        return grid.flip(0) if backwards else grid
