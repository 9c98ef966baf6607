"""Frames of a gallery's samples, with the true, fused and 2D-only boxes as SVG outlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.box_views import frames_to_show, with_poses
from w2r2_ds.data.frames.projection import projected_edges
from w2r2_ds.data.frames.token_rays import scene_intrinsic
from w2r2_ds.data.images import load_frame
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.report.data_uri import jpeg_uri
from w2r2_ds.report.gallery import Answered, boxes_of
from w2r2_ds.types.sample import Sample

WIDTH = 320
"""Width of a frame in the page, pixels."""
FRAMES = 4
"""Most frames of a sample."""
QUALITY = 78
"""JPEG quality of the frames."""


@dataclass(frozen=True)
class Outline:
    """A box drawn into a frame.

    Attributes:
        kind: ``true``, ``fused`` or ``zero``; a class of the style sheet.
        path: SVG path data, in pixels of the picture.
    """

    kind: str
    path: str


@dataclass(frozen=True)
class Picture:
    """A frame.

    Attributes:
        label: index of the frame in the prompt.
        uri: JPEG as a data URI.
        width: pixels.
        height: pixels.
        outlines: boxes.
    """

    label: str
    uri: str
    width: int
    height: int
    outlines: Sequence[Outline]


@dataclass(frozen=True)
class Card:
    """One sample of the gallery.

    Attributes:
        kind: why it is shown, see ``KINDS``.
        answered: the sample, its answers and scores.
        pictures: its frames.
        problem: why there are no frames or boxes; empty if there are.
    """

    kind: str
    answered: Answered
    pictures: Sequence[Picture] = field(default=())
    problem: str = ""


def make_card(kind: str, answered: Answered) -> Card:
    """A card with pictures; without them, and with the reason, if the frames cannot be read."""
    sample = answered.sample
    if not sample.frames:
        return Card(kind, answered)
    problem, intrinsic, boxes = "", None, boxes_of(answered)
    if boxes:
        try:
            intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
            sample = with_poses(sample)
        except ValueError as error:
            problem, boxes = f"No boxes are drawn: {error}", {}
    try:
        shown = frames_to_show(sample, boxes.get("true"), intrinsic, FRAMES)
        pictures = [_picture(sample, index, boxes, intrinsic) for index in shown]
    except ValueError as error:
        return Card(kind, answered, (), f"The frames cannot be read: {error}")
    return Card(kind, answered, pictures, problem)


def _picture(sample: Sample, index: int, boxes: Mapping[str, np.ndarray], intrinsic: np.ndarray | None) -> Picture:
    image = Image.fromarray(load_frame(sample.frames[index]))
    scale = WIDTH / image.width
    width, height = WIDTH, max(1, round(image.height * scale))
    uri = jpeg_uri(image.resize((width, height), Image.Resampling.LANCZOS), QUALITY)
    outlines = []
    for kind, box in boxes.items():
        assert intrinsic is not None
        edges = projected_edges(box, sample.cam_to_world[index], intrinsic) * scale
        # A box at the camera projects to huge numbers, which browsers do not draw.
        edges = np.clip(edges, -10.0 * WIDTH, 10.0 * WIDTH)
        path = "".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in edges)
        if path:
            outlines.append(Outline(kind, path))
    return Picture(f"frame {index}", uri, width, height, outlines)
