"""Pixel values of Qwen2.5-VL's vision tower: normalised patches in the order of transformers' Qwen2-VL processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from w2r2_ds.models.frame_pixels import normalise


def patchify(
    frames: Tensor,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    as_video: bool = False,
) -> Tensor:
    """Cut frames into normalised patches; equal to transformers' processor for frames that need no resizing.

    Order of the patches (rows of ``pixel_values``): image by image, or one temporal patch of a video after the other.
    Within these, row-major over blocks of ``merge_size x merge_size`` patches, and row-major inside a block, so that
    the patches of one merged token are neighbours. Order of the values of a patch: channel, time, row, column.

    Args:
        frames: ``[N, 3, H, W]`` uint8 on any device; H and W are multiples of ``patch_size * merge_size``.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch.
        merge_size: patches per side that the tower merges into one token.
        mean, std: per-channel mean and standard deviation of the normalisation.
        as_video: make one video of all frames, the last frame repeated to fill the last temporal patch. Otherwise each
            frame is an image, repeated in time.

    Returns:
        ``pixel_values`` ``[patches, 3 * temporal_patch_size * patch_size ** 2]`` float32, contiguous, on the device of
        `frames`.

    Raises:
        ValueError: `frames` has another shape or dtype, or sides that are not such multiples.
    """
    step = patch_size * merge_size
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape or frames.dtype != torch.uint8:
        raise ValueError(f"Frames are {frames.dtype} {tuple(frames.shape)}; give uint8 [frames, 3, height, width].")
    if frames.shape[2] % step or frames.shape[3] % step:
        raise ValueError(f"Frames of {frames.shape[3]} x {frames.shape[2]} pixels must be multiples of {step}.")
    if as_video:
        missing = -len(frames) % temporal_patch_size
        whole = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames
        clips = normalise(whole, mean, std).unflatten(0, (-1, temporal_patch_size))
    else:
        # The tower's patches always span `temporal_patch_size` frames. The repetition in time is a view.
        clips = normalise(frames, mean, std)[:, None].expand(-1, temporal_patch_size, -1, -1, -1)
    return _cut(clips, patch_size, merge_size)


def _cut(clips: Tensor, patch: int, merge: int) -> Tensor:
    """Cut clips into patches: ``[n, time, 3, H, W]`` -> ``[n * patches, 3 * time * patch * patch]``."""
    # height = block rows * rows in a block * pixel rows, and the width alike
    cells = clips.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch))
    # [clip, block row, block column, row in block, column in block, channel, time, pixel row, pixel column]
    cells = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cells.flatten(5).flatten(0, 4).contiguous()
