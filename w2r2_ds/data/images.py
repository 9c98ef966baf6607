"""Load frames, resize them to whole patches, and crop them to the token grid of the VLM; with PIL and NumPy.

A frame is resized once, for the geometry encoder; the vision tower of the VLM gets a crop of the same pixels. Resizing
follows VGGT's ``load_and_preprocess_images`` and gives bitwise identical pixels. `visual_inputs.py` calls these
functions for a sample; ``models/<family>/pixels.py`` normalises the crop and cuts it into patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from w2r2_ds.config.schema import DataConfig

WHITE = 255
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that PIL may decode, independent of the file name; some other formats start programs (EPS: Ghostscript)."""
UNSUPPORTED_MODES = ("I", "F")
"""First letters of PIL modes with more than 8 bits per channel, such as depth maps; conversion to RGB clips them."""


def load_frame(path: str | Path) -> np.ndarray:
    """Read an image file as ``uint8 [height, width, 3]`` RGB; a transparent image is blended with white.

    Raises:
        ValueError: the file is missing, not an image, truncated, or has more than 8 bits per channel.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"Frame {path} does not exist; extract the scene's frames again, or correct data.root (or --root)."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            if image.mode[0] in UNSUPPORTED_MODES:
                raise ValueError(f"it has mode {image.mode}, more than 8 bits per channel; is it a depth map?")
            return np.array(_on_white(image) if image.mode == "RGBA" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Frame {path} cannot be read as a colour image ({error}); replace the file.") from error


def frame_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels, from its header.

    Raises:
        ValueError: the file is missing or not an image.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Frame {path} cannot be read as a colour image ({error}); replace the file.") from error


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image blended with white, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image).convert("RGB")


def resize_frames(images: Sequence[np.ndarray], width: int, patch: int, mode: str = "crop") -> np.ndarray:
    """Resize frames to whole patches, as VGGT's ``load_and_preprocess_images`` does.

    Frames that differ in size after resizing are padded with white, centred, to the largest height and width.

    Args:
        images: frames, ``uint8 [height, width, 3]`` each.
        width: target width in pixels, a multiple of `patch`.
        patch: side in pixels of the geometry encoder's patches.
        mode: ``crop`` scales a frame to the target width, its height to the nearest multiple of `patch`, and crops a
            height above the target width at top and bottom. ``pad`` scales the longer side to the target width, and
            pads the other side with white to a square.

    Returns:
        ``float32 [N, 3, H, W]`` in [0, 1]; H and W are multiples of `patch`.

    Raises:
        ValueError: there are no frames, a frame has another shape or dtype or is too narrow, or width or mode is
            invalid.
    """
    if width <= 0 or width % patch:
        raise ValueError(f"frame width {width} must be a positive multiple of {patch}.")
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode {mode!r} must be 'crop' or 'pad'.")
    if len(images) == 0:
        raise ValueError("No frames were given; a sample needs at least one.")
    frames = [_fit(image, width, patch, mode) for image in images]
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    pixels = np.stack([_pad(frame, height, width) for frame in frames]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)


def _fit(image: np.ndarray, target: int, patch: int, mode: str) -> np.ndarray:
    """One frame resized and cropped or padded, ``uint8 [H, W, 3]``."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"A frame is {image.dtype} {image.shape}; it must be uint8 [height, width, 3].")
    height, width = image.shape[:2]
    # The width becomes `target`, except for a portrait image in mode pad: there the height does.
    by_height = mode == "pad" and height > width
    new_height = target if by_height else _scaled_height(width, height, target, patch)
    new_width = _to_patches(width * (target / height), patch) if by_height else target
    if not new_height or not new_width:
        raise ValueError(f"A frame of {width} x {height} pixels is too narrow to resize to {target}; remove it.")
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    if mode == "pad":
        return _pad(resized, target, target)
    top = max(0, new_height - target) // 2
    return resized[top : top + target]


def crop_size(sizes: Sequence[tuple[int, int]], target: int, patch: int) -> tuple[int, int]:
    """``(width, height)`` in pixels of the frames after `resize_frames` in mode ``crop``.

    Args:
        sizes: ``(width, height)`` of every frame in pixels.
        target: target width in pixels, a multiple of `patch`.
        patch: side in pixels of the geometry encoder's patches.
    """
    return target, max(min(target, _scaled_height(width, height, target, patch)) for width, height in sizes)


def _scaled_height(width: int, height: int, target: int, patch: int) -> int:
    """Height in pixels, a multiple of `patch`, of a frame that is scaled to width `target`."""
    return _to_patches(height * (target / width), patch)


def _to_patches(length: float, patch: int) -> int:
    """Round to the nearest multiple of the patch size; halfway, to an even number of patches."""
    return round(length / patch) * patch


def _pad(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad ``uint8 [h, w, 3]`` with white, centred, to `height` x `width`; an odd pixel goes to the bottom or right."""
    missing = (height - frame.shape[0], width - frame.shape[1])
    widths = [(count // 2, count - count // 2) for count in missing]
    return np.pad(frame, (*widths, (0, 0)), constant_values=WHITE)


def even_crop(images: np.ndarray, patch: int = 14, merge: int = 2) -> np.ndarray:
    """Crop ``[N, 3, H, W]`` at bottom and right to multiples of ``patch * merge``, so that patches can be merged.

    Args:
        images: frames.
        patch: side in pixels of the vision tower's patches.
        merge: patches per side that become one token.

    Raises:
        ValueError: a frame is smaller than one merged patch.
    """
    height, width = even_size(images.shape[-2], images.shape[-1], patch, merge)
    return images[..., :height, :width]


def even_size(height: int, width: int, patch: int = 14, merge: int = 2) -> tuple[int, int]:
    """``(height, width)`` in pixels after `even_crop`; raises the same error."""
    step = patch * merge
    if height < step or width < step:
        raise ValueError(
            f"Frames of {width} x {height} pixels are smaller than one merged patch of {step} x {step}; raise "
            "data.frame_width."
        )
    return height // step * step, width // step * step


def input_bytes(frames: Sequence[Path], config: DataConfig) -> int:
    """Bytes of a sample's frames as float32 inputs of both encoders; all frames are counted as large as the first."""
    width, height = crop_size([frame_size(frames[0])], config.frame_width, patch=1)
    # The vision tower gets every image twice (repeated in time), and the frames of a video in pairs.
    tower_frames = 2 * len(frames) if config.visual == "images" else len(frames) + len(frames) % 2
    return (len(frames) + tower_frames) * 3 * width * height * 4
