"""Frames from disk to the inputs of VGGT and of Qwen's vision tower; PIL and NumPy only.

Both see the same pixels: a frame is resized once for VGGT, and Qwen gets a crop of that. Values are those of the
public pre-processing codes, bit for bit, without the libraries that they pull in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

VGGT_PATCH = 14
WHITE = 255
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is looked for in an image file, whatever its name; of the others some start programs (EPS: Ghostscript)."""
UNSUPPORTED = ("I", "F")
"""First letters of PIL modes with more than 8 bits, such as depth maps; a conversion would clip them."""


def load_frame(path: str | Path) -> np.ndarray:
    """An image file as ``uint8 [height, width, 3]`` RGB; RGBA is put on white, gray becomes RGB.

    Raises:
        ValueError: the file is missing, no image, truncated, or has more than 8 bits per channel.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"Frame {path} does not exist; extract the scene's frames again, or correct data.root (or --root)."
        )
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            if image.mode[0] in UNSUPPORTED:
                raise ValueError(f"it has mode {image.mode}, more than 8 bits per channel; is it a depth map?")
            return np.array(_on_white(image) if image.mode == "RGBA" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Frame {path} cannot be read as a colour image ({error}); replace the file.") from error


def frame_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels, from its header.

    Raises:
        ValueError: the file is missing or no image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Frame {path} cannot be read as a colour image ({error}); replace the file.") from error


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image).convert("RGB")


def resize_for_vggt(images: Sequence[np.ndarray], width: int = 518, mode: str = "crop") -> np.ndarray:
    """Resize frames as VGGT's own loader does.

    ``crop`` makes every frame `width` wide, its height the nearest multiple of 14, and cuts what is higher than
    `width` at top and bottom. ``pad`` makes the longer side `width` and pads the other with white to a square. Frames
    that still differ in size are padded with white, centred, to the largest.

    Args:
        images: ``uint8 [height, width, 3]`` each.
        width: target width in pixels, a multiple of 14.
        mode: ``crop`` or ``pad``.

    Returns:
        ``float32 [N, 3, H, W]`` in [0, 1]; H and W are multiples of 14.

    Raises:
        ValueError: no frames, a frame of another form or too narrow, or a bad width or mode.
    """
    if width <= 0 or width % VGGT_PATCH:
        raise ValueError(f"frame width {width} must be a positive multiple of {VGGT_PATCH}.")
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode {mode!r} must be 'crop' or 'pad'.")
    if len(images) == 0:
        raise ValueError("No frames were given; a sample needs at least one.")
    frames = [_fit(image, width, mode) for image in images]
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    pixels = np.stack([_pad(frame, height, width) for frame in frames]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)


def _fit(image: np.ndarray, target: int, mode: str) -> np.ndarray:
    """One frame at its size for VGGT, ``uint8 [H, W, 3]``."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"A frame is {image.dtype} {image.shape}; give uint8 [height, width, 3].")
    height, width = image.shape[:2]
    by_height = mode == "pad" and height > width
    new_height = target if by_height else _scaled_height(width, height, target)
    new_width = _to_patches(width * (target / height)) if by_height else target
    if not new_height or not new_width:
        raise ValueError(f"A frame of {width} x {height} pixels is too narrow to resize to {target}; leave it out.")
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    if mode == "pad":
        return _pad(resized, target, target)
    top = max(0, new_height - target) // 2
    return resized[top : top + target]


def crop_size(sizes: Sequence[tuple[int, int]], target: int) -> tuple[int, int]:
    """Width and height that `resize_for_vggt` gives frames of these ``(width, height)``, in its mode ``crop``."""
    return target, max(min(target, _scaled_height(width, height, target)) for width, height in sizes)


def _scaled_height(width: int, height: int, target: int) -> int:
    """Height in whole patches of a frame that is made `target` wide."""
    return _to_patches(height * (target / width))


def _to_patches(length: float) -> int:
    """The multiple of the patch size that is nearest; of two, the one of an even number of patches."""
    return round(length / VGGT_PATCH) * VGGT_PATCH


def _pad(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """White around ``[h, w, 3]``, an odd pixel at bottom or right."""
    missing = (height - frame.shape[0], width - frame.shape[1])
    edges = [(short // 2, short - short // 2) for short in missing]
    return np.pad(frame, (*edges, (0, 0)), constant_values=WHITE)


def even_crop(images: np.ndarray, patch: int = 14, merge: int = 2) -> np.ndarray:
    """Cut ``[N, 3, H, W]`` at bottom and right so that its patches can be merged `merge` by `merge`.

    Raises:
        ValueError: frames smaller than one merged patch.
    """
    height, width = even_size(images.shape[-2], images.shape[-1], patch, merge)
    return images[..., :height, :width]


def even_size(height: int, width: int, patch: int = 14, merge: int = 2) -> tuple[int, int]:
    """Height and width of what `even_crop` leaves, which raises the same."""
    step = patch * merge
    if height < step or width < step:
        raise ValueError(
            f"Frames of {width} x {height} pixels are smaller than one merged patch of {step} x {step}; raise "
            "data.frame_width."
        )
    return height // step * step, width // step * step


def qwen_patches(
    images: np.ndarray,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    as_video: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Patches as Qwen's vision tower takes them: the stock processor's values for frames of exactly this size.

    Patches come frame by frame (or pair by pair); inside, merged patches are row-major, and so are the patches of each.

    Args:
        images: ``[N, 3, H, W]`` float32 in [0, 1]; H and W are multiples of ``patch_size * merge_size``.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames of a patch.
        merge_size: patches that the tower merges, per side.
        mean: subtracted, per channel.
        std: divided by, per channel.
        as_video: one video of consecutive frames, the last one repeated to fill the last patch; otherwise each frame
            is an image, repeated in time.

    Returns:
        ``pixel_values`` float32 ``[patches, 3 * temporal_patch_size * patch_size ** 2]`` and ``grid_thw`` int64
        ``[N, 3]``, or ``[1, 3]`` of a video: patches in time, height and width.

    Raises:
        ValueError: images of another form or size.
    """
    step = patch_size * merge_size
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"Frames have shape {images.shape}; give [frames, 3, height, width].")
    if images.shape[2] % step or images.shape[3] % step:
        raise ValueError(f"Frames of {images.shape[3]} x {images.shape[2]} pixels must be multiples of {step}.")
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    normalised = _normalise(images, mean, std)
    if as_video:
        clips = _clips(normalised, temporal_patch_size)
        grid = [[len(clips), rows, columns]]
    else:
        clips = np.repeat(normalised[:, None], temporal_patch_size, axis=1)
        grid = [[1, rows, columns]] * len(images)
    return _patchify(clips, patch_size, merge_size), np.array(grid, dtype=np.int64)


def _normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    centre, spread = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (mean, std))
    return (images.astype(np.float32) - centre) / spread


def _clips(frames: np.ndarray, length: int) -> np.ndarray:
    """``[N, 3, H, W]`` -> ``[ceil(N / length), length, 3, H, W]``, the last frame repeated."""
    short = -len(frames) % length
    whole = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    return whole.reshape(-1, length, *frames.shape[1:])


def _patchify(clips: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """``[n, time, 3, H, W]`` -> ``[n * patches, 3 * time * patch * patch]``."""
    count, time, channels, height, width = clips.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cells = clips.reshape(count, time, channels, rows, merge, patch, columns, merge, patch)
    cells = cells.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(cells).reshape(-1, channels * time * patch * patch)
