"""Pictures of a few validation samples during training: frames with the true box and the predicted one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.data.frames.box_views import frames_to_show, with_poses
from w2r2_ds.data.frames.projection import projected_edges
from w2r2_ds.data.frames.token_rays import scene_intrinsic
from w2r2_ds.data.images import load_frame
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.evaluation.protocols.records import AnswerRecord, answer_world_box, nine_numbers
from w2r2_ds.types.sample import Sample

SAMPLES = 4
"""Most samples in a picture."""
FRAMES = 3
"""Most frames of a sample."""
WIDTH = 320
"""Width of a frame, pixels."""
GAP = 6
"""Space between frames, pixels."""
LINE = 18
"""Height of a line of text, pixels."""
TITLE_LINES = 2
"""Most lines of a sample's title."""
COLORS = {"true": (61, 220, 132), "predicted": (255, 159, 67)}
"""Box -> line colour; those of the report's gallery."""


def drawable_samples(samples: Sequence[Sample]) -> list[int]:
    """Indices of the first grounding samples whose boxes can be drawn.

    Raises:
        ValueError: there are none, or the intrinsics or poses of a scene are missing.
    """
    grounding = [
        index
        for index, sample in enumerate(samples)
        if sample.kind == "grounding" and sample.target is not None and sample.frames
    ]
    if not grounding:
        tasks = ", ".join(sorted({sample.task for sample in samples}))
        raise ValueError(
            f"train.samples_every: none of the {len(samples)} validation samples ({tasks}) has a target box and "
            "frames; add a grounding set to data.val, raise train.eval_samples, or set the option to 0."
        )
    drawable = grounding[:SAMPLES]
    for index in drawable:
        try:
            scene_intrinsic(scene_folder(samples[index].frames[0]))
            with_poses(samples[index])
        except ValueError as error:
            raise ValueError(f"train.samples_every: {error}") from None
    return drawable


def draw_samples(samples: Sequence[Sample], records: Sequence[AnswerRecord], title: str) -> Image.Image:
    """One picture of all samples: a row each, its description above its frames.

    Args:
        samples: samples of `drawable_samples`.
        records: their answers.
        title: first line of the picture.

    Raises:
        ValueError: a frame cannot be read.
    """
    rows = [_row(sample, record) for sample, record in zip(samples, records, strict=True)]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, LINE + GAP + sum(row.height + GAP for row in rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 3), title, "black", _font())
    x = width - GAP
    for name, color in reversed(COLORS.items()):
        label = f"{name} box"
        x -= round(pen.textlength(label, _font()))
        pen.text((x, 3), label, "black", _font())
        pen.line((x - 26, LINE / 2 + 2, x - 6, LINE / 2 + 2), color, 4)
        x -= 40
    y = LINE + GAP
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height + GAP
    return sheet


def _row(sample: Sample, record: AnswerRecord) -> Image.Image:
    """Title and frames of one sample."""
    assert sample.target is not None, "chosen samples have a target"
    sample = with_poses(sample)
    assert sample.target is not None
    boxes = {"true": np.asarray(sample.target.box)}
    predicted = answer_world_box(record)
    if predicted is None:
        found = "no box in the answer"
    else:
        boxes["predicted"] = np.asarray(predicted)
        found = f"IoU {_iou(nine_numbers(sample.target.box.tolist()), nine_numbers(predicted)):.2f}"
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    shown = frames_to_show(sample, boxes["true"], intrinsic, FRAMES)
    frames = [_frame(sample, index, boxes, intrinsic) for index in shown]
    width = FRAMES * (WIDTH + GAP) - GAP
    description = sample.question[slice(*sample.what)] or sample.target.object_name
    text = f"{found}: {' '.join(description.split())}"
    lines = textwrap.wrap(text, width // 7, max_lines=TITLE_LINES, placeholder=" ...")
    top = len(lines) * LINE + 4
    row = Image.new("RGB", (width, top + max(frame.height for frame in frames)), "white")
    ImageDraw.Draw(row).text((GAP, 1), "\n".join(lines), "black", _font(), spacing=LINE - 14)
    for column, frame in enumerate(frames):
        row.paste(frame, (column * (WIDTH + GAP), top))
    return row


def _frame(sample: Sample, index: int, boxes: Mapping[str, np.ndarray], intrinsic: np.ndarray) -> Image.Image:
    image = Image.fromarray(load_frame(sample.frames[index]))
    scale = WIDTH / image.width
    picture = image.resize((WIDTH, max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    edges = {name: projected_edges(box, sample.cam_to_world[index], intrinsic) for name, box in boxes.items()}
    # A dark line below each bright one, so that boxes are visible on any frame.
    for width, colors in ((5, dict.fromkeys(COLORS, (0, 0, 0))), (3, COLORS)):
        for name, lines in edges.items():
            for line in np.clip((lines + 0.5) * scale, -10.0 * WIDTH, 10.0 * WIDTH):
                pen.line([tuple(point) for point in line.tolist()], colors[name], width)
    return picture


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    """IoU of two world boxes with nine numbers."""
    return float(box_iou(*(torch.tensor([box], dtype=torch.float64) for box in (one, other))))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)
