"""Sizes of a vision tower, and the token ids of its VLM, for pre-processing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision tower that are in ``config.json``; no other file is read.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches per side that become one token of the language model.
        depth: number of transformer blocks.
    """

    patch_size: int
    merge_size: int
    depth: int


@dataclass(frozen=True)
class VisionSpec:
    """Patch sizes, normalisation and token ids of a VLM.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches per side that become one token of the language model.
        temporal_patch_size: consecutive frames of a video that one patch spans.
        window_size: side in pixels of a window of the tower's attention; 0 without windows.
        image_mean: per-channel mean (RGB) for normalisation of pixels in [0, 1].
        image_std: per-channel standard deviation (RGB).
        image_token_id: id of the placeholder token of an image; repeated for each of its visual tokens.
        video_token_id: id of the placeholder token of a video.
        vision_start_id: id of the token before an image or video.
        tokens_per_second: temporal positions per second of video; 0 where positions do not depend on time.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_token_id: int
    video_token_id: int
    vision_start_id: int
    tokens_per_second: int
