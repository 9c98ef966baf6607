"""Contact sheets: one image with all frames of a scene, the boxes of its described objects, and the descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from w2r2_ds.data.frames.projection import MIN_VISIBLE_FRACTION, projected_area, projected_edges, visible_fraction
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.demo.synthetic.rooms import RoomObject
from w2r2_ds.demo.synthetic.sentences import Sentence

_COLUMNS, _TILE_WIDTH, _LINE = 6, 240, 16
"""Frames per row; width of a frame and height of a line of text, pixels."""
_LINE_COLORS = ("#00e5ff", "#ffea00", "#ff4dff", "#76ff03", "#ff6e40", "#ffffff", "#7c9dff", "#ff1744")


def write_sheet(
    path: Path,
    frames: Sequence[Frame],
    colors: Sequence[np.ndarray],
    depths: Sequence[np.ndarray],
    intrinsic: np.ndarray,
    objects: Sequence[RoomObject],
    sentences: Sequence[Sentence],
) -> None:
    """Write one PNG: frames in rows with boxes and ids of visible objects, and the sentences below.

    Args:
        path: file to write.
        frames: posed frames.
        colors: ``[height, width, 3]`` uint8 per frame.
        depths: ``[height, width]`` uint16 per frame, millimetres.
        intrinsic: ``[4, 4]``, of colour and depth images.
        objects: all objects; ``objects[i].object_id == i``.
        sentences: descriptions of the objects.
    """
    height, width = depths[0].shape
    tile = (_TILE_WIDTH, round(_TILE_WIDTH * height / width))
    rows = -(-len(frames) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * tile[0], rows * tile[1] + (len(sentences) + 1) * _LINE), "#202020")
    targets = list(dict.fromkeys(sentence.object_id for sentence in sentences))
    shades = {target: _LINE_COLORS[i % len(_LINE_COLORS)] for i, target in enumerate(targets)}
    for i, frame in enumerate(frames):
        image = Image.fromarray(colors[i]).resize(tile, Image.Resampling.BILINEAR)
        for target in targets:
            _draw_object(image, objects[target], frame, intrinsic, depths[i], shades[target])
        ImageDraw.Draw(image).text(
            (3, 2), f"Frame-{i}", fill="white", font=_font(11), stroke_width=1, stroke_fill="black"
        )
        sheet.paste(image, (i % _COLUMNS * tile[0], i // _COLUMNS * tile[1]))
    draw = ImageDraw.Draw(sheet)
    for line, sentence in enumerate(sentences):
        text = f"#{sentence.object_id} ({objects[sentence.object_id].color} {sentence.name}): {sentence.text}"
        draw.text((6, rows * tile[1] + 4 + line * _LINE), text, fill=shades[sentence.object_id], font=_font(12))
    sheet.save(path, compress_level=1)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _draw_object(
    image: Image.Image, target: RoomObject, frame: Frame, intrinsic: np.ndarray, depth: np.ndarray, shade: str
) -> None:
    """Draw the wire frame and label of an object into a scaled frame, if it is visible there."""
    height, width = depth.shape
    is_visible = visible_fraction(target.box, frame.cam_to_world, intrinsic, depth) >= MIN_VISIBLE_FRACTION
    if not is_visible or projected_area(target.box, frame.cam_to_world, intrinsic, (width, height)) <= 0:
        return
    draw = ImageDraw.Draw(image)
    lines = projected_edges(target.box, frame.cam_to_world, intrinsic) * (image.width / width)
    for (x0, y0), (x1, y1) in lines:
        draw.line((x0, y0, x1, y1), fill=shade, width=2)
    x, y = np.clip(lines.reshape(-1, 2).min(axis=0), 2, (image.width - 70, image.height - 14))
    label = f"#{target.object_id} {target.name}"
    draw.text((x, y), label, fill=shade, font=_font(11), stroke_width=1, stroke_fill="black")
