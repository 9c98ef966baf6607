"""Heat maps of attention over the frames of a sample, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from w2r2_ds.data.frames.projection import clipped_corners
from w2r2_ds.data.frames.token_rays import scene_intrinsic, token_points
from w2r2_ds.data.images import load_frame
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.diagnostics.attention.anchors import AnchorRecord
from w2r2_ds.diagnostics.attention.target_tokens import hull_outline
from w2r2_ds.types.sample import Sample

HEAT = np.array([255.0, 40.0, 0.0])
"""Colour of the highest attention."""
OPACITY = 0.75
"""Opacity of the highest attention."""
WIDTH = 240
"""Width of a frame in the picture, pixels."""
GAP = 4
"""Space between frames, pixels."""


def save_heat_map(
    path: Path, sample: Sample, records: Sequence[AnchorRecord], preprocessor: VisualPreprocessor, frames: int = 6
) -> None:
    """Write one picture: a row per record (pass), a column per frame.

    Red is attention, relative to the highest in the row; a white cross is the anchor; a green outline is the projected
    box of the target.

    Args:
        path: PNG file.
        sample: the sample.
        records: its records, one per pass.
        preprocessor: options of pre-processing.
        frames: number of frames: those with the highest attention in any row, in their order.
    """
    owner, points = token_points(sample, preprocessor, per_side=1)
    peak = {frame: max(_relative(r)[owner == frame].max() for r in records) for frame in np.unique(owner).tolist()}
    shown = sorted(sorted(peak, key=lambda frame: -peak[frame])[:frames])
    rows = []
    for record in records:
        heat = _relative(record)
        row = []
        for frame in shown:
            own = owner == frame
            row.append(frame_heat_map(sample, frame, points[own, 0], heat[own], record))
        rows.append(row)
    height = max(image.height for image in rows[0])
    sheet = Image.new("RGB", ((WIDTH + GAP) * len(shown) - GAP, (height + GAP) * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (WIDTH + GAP), y * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _relative(record: AnchorRecord) -> np.ndarray:
    """``[tokens]`` attention relative to its maximum; all 0 if there is none."""
    highest = float(record.attention.max())
    relative: np.ndarray = record.attention / highest if highest > 0 else record.attention
    return relative


def frame_heat_map(
    sample: Sample, frame: int, pixels: np.ndarray, heat: np.ndarray, record: AnchorRecord
) -> Image.Image:
    """One frame with its heat map, resized to `WIDTH`.

    Args:
        sample: the sample.
        frame: index of the frame.
        pixels: ``[tokens, 2]`` centres (x, y) of the frame's tokens in the file, row by row.
        heat: ``[tokens]`` attention in [0, 1].
        record: has the anchor.
    """
    image = load_frame(sample.frames[frame])
    height, width = image.shape[:2]
    opacity = OPACITY * interpolated(pixels, heat, width, height)[..., None]
    blended = Image.fromarray((image * (1 - opacity) + HEAT * opacity).round().astype(np.uint8))
    scale = WIDTH / width
    picture = blended.resize((WIDTH, max(1, round(height * scale))), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    outline = _target_outline(sample, frame, (width, height))
    if len(outline) > 2:
        draw.polygon([tuple((point + 0.5) * scale) for point in outline], outline=(0, 220, 60), width=2)
    if record.frame == frame:
        x, y = (np.array(record.pixel) + 0.5) * scale
        for dx, dy in ((7, 7), (7, -7)):
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=(255, 255, 255), width=2)
    return picture


def interpolated(pixels: np.ndarray, values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear interpolation of values at token centres to all pixels of a frame, ``[height, width]``.

    Args:
        pixels: ``[tokens, 2]`` centres (x, y) of a regular grid, row by row.
        values: ``[tokens]``.
        width, height: size of the frame in pixels.
    """
    xs, ys = np.unique(pixels[:, 0]), np.unique(pixels[:, 1])
    grid = values.reshape(len(ys), len(xs)).astype(np.float64)
    along_x = np.stack([np.interp(np.arange(width), xs, row) for row in grid])
    return np.stack([np.interp(np.arange(height), ys, column) for column in along_x.T], axis=1)


def _target_outline(sample: Sample, frame: int, size: tuple[int, int]) -> np.ndarray:
    """``[k, 2]`` pixels of the convex outline of the target's projected box; empty if it is not in the frame."""
    pose = sample.cam_to_world[frame]
    if sample.target is None or not np.isfinite(pose).all():
        return np.zeros((0, 2))
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    return hull_outline(clipped_corners(sample.target.box, pose, intrinsic, size))
