"""Load frames and resize them to whole patches, with PIL and NumPy.

A frame is resized once, for the geometry encoder; the vision tower of the VLM gets a crop of the same pixels. Resizing
follows VGGT's ``load_and_preprocess_images`` and gives bitwise identical pixels. `visual_inputs.py` calls these
functions for a sample. Frames stay ``uint8`` until they are on the device (``models/frame_pixels.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from w2r2_ds.config.schema import DataConfig

WHITE = 255
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that PIL may decode, independent of the file name; some other formats start programs (EPS: Ghostscript)."""
UNSUPPORTED_MODES = ("I", "F")
"""First letters of PIL modes with more than 8 bits per channel, such as depth maps; conversion to RGB clips them."""
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> operation that turns the stored image upright; 1 is upright (EXIF 2.32, tag 274)."""
SWAP_SIDES = {ORIENTATIONS[orientation] for orientation in (5, 6, 7, 8)}
"""Operations that exchange width and height."""


FILE_MARKERS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xae\x42\x60\x82"}
"""First bytes of a complete JPEG or PNG file -> its last bytes: end marker, or last chunk with its checksum."""
TAIL = 1024
"""Number of bytes at the end of a file that are searched for the end marker; some programs append data after it."""
THREADS = 16
"""Number of concurrent reads; they hide the latency of a network file system."""


def load_frame(path: str | Path) -> np.ndarray:
    """Read an image file as ``uint8 [height, width, 3]`` RGB, upright; a transparent image is blended with white.

    Raises:
        ValueError: the file is missing, not an image, truncated, or has more than 8 bits per channel.
    """
    return np.asarray(_read_rgb(path))


def frame_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of `load_frame`'s result, from the header of the file.

    Raises:
        ValueError: the file is missing, not an image, or has more than 8 bits per channel.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _upright(image) in SWAP_SIDES else (width, height)


def check_frame(path: str | Path) -> tuple[int, int]:
    """Width and height of a frame that `load_frame` can read, without decoding it.

    Short reads: the file must begin and end as a JPEG or a PNG file does, and its header must be that of a colour
    image. Any other file is decoded, which raises the error that `load_frame` raises. Damage in the middle of a file is
    not detected.

    Raises:
        ValueError: see `load_frame`.
    """
    if not is_complete_image(path):
        load_frame(path)  # raises; or decodes an image of another format, such as WebP
    return frame_size(path)


def is_complete_image(path: str | Path) -> bool:
    """Whether a file begins and ends as a JPEG or a PNG file does; False if it cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(max(0, file.seek(0, 2) - TAIL))
            tail = file.read()
    except OSError:
        return False
    return any(head.startswith(begin) and end in tail for begin, end in FILE_MARKERS.items())


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose header has been read; every error of reading it is a ValueError with its path."""
    if not Path(path).is_file():
        raise ValueError(
            f"Frame {path} does not exist; extract the scene's frames again, or correct data.root (or --root)."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode[0] in UNSUPPORTED_MODES:
                raise ValueError(f"it has mode {image.mode}, more than 8 bits per channel; is it a depth map?")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Frame {path} cannot be read as a colour image ({error}); replace the file.") from error


def _read_rgb(path: str | Path) -> Image.Image:
    """Decode a file to an upright RGB image."""
    with _opened(path) as image:
        turn = _upright(image)
        image.load()
        upright = image if turn is None else image.transpose(turn)
        if upright.mode == "RGBA":
            return _on_white(upright)
        # `convert` and `copy` would copy the pixels of an RGB image; `load` has closed the file.
        return upright if upright.mode == "RGB" else upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Transpose | None:
    """How an image must be turned according to its EXIF orientation; None for an upright image.

    Only metadata before the pixels count, so that `frame_size` and `load_frame` agree. An EXIF block that cannot be
    read is ignored, as viewers do.
    """
    try:
        # Not `image.getexif()`: for a PNG file it decodes the pixels, to find metadata behind them.
        return ORIENTATIONS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError):
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """An RGBA image blended with white, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image).convert("RGB")


def load_resized(path: str | Path, width: int, patch: int, mode: str = "crop") -> np.ndarray:
    """Read and resize one frame, ``uint8 [H, W, 3]``; for the arguments see `resize_frames`.

    Raises:
        ValueError: as `load_frame`, or the frame is too narrow; the message has the path.
    """
    image = _read_rgb(path)
    with naming(path):
        return _fit(image, width, patch, mode)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the path of a frame before the message of a ValueError of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Frame {path}: {error}") from error


def resize_frames(images: Sequence[np.ndarray], width: int, patch: int, mode: str = "crop") -> np.ndarray:
    """Resize frames to whole patches, as VGGT's ``load_and_preprocess_images`` does, and stack them.

    Args:
        images: frames, ``uint8 [height, width, 3]`` each.
        width: target width in pixels, a multiple of `patch`.
        patch: side in pixels of the geometry encoder's patches.
        mode: ``crop`` scales a frame to the target width, its height to the nearest multiple of `patch`, and crops a
            height above the target width at top and bottom. ``pad`` scales the longer side to the target width, and
            pads the other side with white to a square.

    Returns:
        ``uint8 [N, 3, H, W]``; H and W are multiples of `patch`. See `stack_frames`.

    Raises:
        ValueError: there are no frames, a frame has another shape or dtype or is too narrow, or width or mode is
            invalid.
    """
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"A frame is {image.dtype} {image.shape}; it must be uint8 [height, width, 3].")
    return stack_frames([_fit(Image.fromarray(image), width, patch, mode) for image in images])


def stack_frames(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Stack resized frames ``uint8 [H, W, 3]``: ``uint8 [N, 3, H, W]``.

    Frames that differ in size are padded with white, centred, to the largest height and width.

    Raises:
        ValueError: there are no frames.
    """
    if len(frames) == 0:
        raise ValueError("No frames were given; a sample needs at least one.")
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    stacked = np.empty((len(frames), 3, height, width), dtype=np.uint8)
    for index, frame in enumerate(frames):
        stacked[index] = _pad(frame, height, width).transpose(2, 0, 1)
    return stacked


def _fit(image: Image.Image, target: int, patch: int, mode: str) -> np.ndarray:
    """One RGB frame resized and cropped or padded, ``uint8 [H, W, 3]``."""
    resized = np.asarray(image.resize(scaled_size(image.size, target, patch, mode), Image.Resampling.BICUBIC))
    if mode == "pad":
        return _pad(resized, target, target)
    top = max(0, len(resized) - target) // 2
    return resized[top : top + target]


def scaled_size(size: tuple[int, int], target: int, patch: int, mode: str = "crop") -> tuple[int, int]:
    """``(width, height)`` of a frame of ``(width, height)`` pixels after scaling, before it is cropped or padded.

    For the other arguments see `resize_frames`.

    Raises:
        ValueError: a side would have no pixels, or width or mode is invalid.
    """
    if target <= 0 or target % patch:
        raise ValueError(f"frame width {target} must be a positive multiple of {patch}.")
    if mode not in ("crop", "pad"):
        raise ValueError(f"mode {mode!r} must be 'crop' or 'pad'.")
    width, height = size
    # The width becomes `target`, except for a portrait image in mode pad: there the height does.
    if mode == "pad" and height > width:
        scaled = _to_patches(width * (target / height), patch), target
    else:
        scaled = target, _to_patches(height * (target / width), patch)
    if 0 in scaled:
        raise ValueError(f"a frame of {width} x {height} pixels is too narrow to resize to {target}; remove it.")
    return scaled


def scaled_offset(
    size: tuple[int, int], stacked: tuple[int, int], target: int, patch: int, mode: str = "crop"
) -> tuple[int, int]:
    """``(left, top)`` of a scaled frame in the result of `resize_frames`, in pixels; negative where it is cropped.

    Args:
        size: ``(width, height)`` of the frame in pixels.
        stacked: ``(width, height)`` of the result, from `fitted_size`.
        target, patch, mode: see `resize_frames`.
    """
    width, height = scaled_size(size, target, patch, mode)
    top = (stacked[1] - min(height, target)) // 2 - max(0, height - target) // 2  # padding minus crop
    return (stacked[0] - width) // 2, top


def fitted_size(sizes: Sequence[tuple[int, int]], target: int, patch: int, mode: str = "crop") -> tuple[int, int]:
    """``(width, height)`` in pixels of the result of `resize_frames`.

    Args:
        sizes: ``(width, height)`` of every frame in pixels.
        target, patch, mode: see `resize_frames`.

    Raises:
        ValueError: see `scaled_size`.
    """
    scaled = [scaled_size(size, target, patch, mode) for size in sizes]
    if mode == "pad":
        return target, target
    return target, max(min(target, height) for _, height in scaled)


@dataclass(frozen=True)
class Placement:
    """Where a resized frame shows its image file.

    Attributes:
        size: width and height of the image file, pixels.
        scaled: width and height of the scaled image, before it is cropped or padded, pixels.
        offset: (x, y) of the scaled image's upper left corner in the resized frame; negative where it is cropped.
    """

    size: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    def to_original(self, positions: np.ndarray) -> np.ndarray:
        """Pixels of the image file that a resized frame shows at some positions.

        Args:
            positions: ``[..., 2]`` (x, y) in pixels from the upper left corner of the resized frame: the centre of its
                first pixel is (0.5, 0.5).

        Returns:
            ``[..., 2]`` float64 pixel coordinates, where the centre of the first pixel is (0, 0), as for intrinsics.
        """
        return (positions - np.array(self.offset)) * (np.array(self.size) / np.array(self.scaled)) - 0.5


def place_frame(
    size: tuple[int, int], stacked: tuple[int, int], target: int, patch: int, mode: str = "crop"
) -> Placement:
    """Where `resize_frames` shows one of its frames.

    Args:
        size: ``(width, height)`` of the frame in pixels.
        stacked: ``(width, height)`` of the result of `resize_frames`, for all frames.
        target, patch, mode: see `resize_frames`.
    """
    width, height = scaled_size(size, target, patch, mode)
    # As in `_fit` and `_pad`: a height above the target is cropped, then both sides are padded to the largest frame.
    cropped = min(height, target)
    left, top = (stacked[0] - width) // 2, (stacked[1] - cropped) // 2 - (height - cropped) // 2
    return Placement(size, (width, height), (left, top))


def lost_height(size: tuple[int, int], target: int, patch: int, mode: str = "crop") -> float:
    """Fraction of a frame's height that `resize_frames` crops; for the arguments see `scaled_size`."""
    _, height = scaled_size(size, target, patch, mode)
    return max(0.0, 1 - target / height)


def _to_patches(length: float, patch: int) -> int:
    """Round to the nearest multiple of the patch size; halfway, to an even number of patches."""
    return round(length / patch) * patch


def _pad(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad ``uint8 [h, w, 3]`` with white, centred, to `height` x `width`; an odd pixel goes to the bottom or right."""
    missing = (height - frame.shape[0], width - frame.shape[1])
    if missing == (0, 0):
        return frame
    widths = [(count // 2, count - count // 2) for count in missing]
    return np.pad(frame, (*widths, (0, 0)), constant_values=WHITE)


def input_bytes(frames: Sequence[Path], config: DataConfig) -> int:
    """Bytes of a sample's resized frames, which both encoders share; all are counted as large as the first."""
    size = frame_size(frames[0])
    with naming(frames[0]):
        width, height = fitted_size([size], config.frame_width, 1, config.frame_fit)
    return len(frames) * 3 * width * height
