"""Intervention: the geometry of one frame is removed; its pixels, and the geometry of all other frames, stay.

A model that combines the geometry of all frames keeps its answer as long as another frame shows the target, so the
expected movement is 0. The movement is therefore measured by the number of frames that show the target. Two frames are
removed, each in an evaluation of its own:

    target  the frame that shows most of the target
    other   the first frame that does not show it: a control, which takes no geometry of the target away

A frame shows the target if the surface that its depth image measures lies in the target's box at one of
`COLUMNS` x `ROWS` viewing rays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch

from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix
from w2r2_ds.data.frames.point_maps import camera_points
from w2r2_ds.data.frames.projection import read_depth
from w2r2_ds.data.images import frame_size
from w2r2_ds.data.processor import Features
from w2r2_ds.data.sources.depth_frames import find_depth_frame
from w2r2_ds.diagnostics.bootstrap import Estimate, Ratio, SceneBootstrap
from w2r2_ds.evaluation.conditions import Condition, SampleProcessor
from w2r2_ds.evaluation.protocols.records import AnswerRecord, answer_world_box
from w2r2_ds.types.sample import Sample

Which = Literal["target", "other"]
WHICH: tuple[Which, ...] = ("target", "other")
COLUMNS, ROWS = 64, 48
"""Viewing rays of a frame on which the target is searched; they do not depend on the model's patches."""
MARGIN = 0.02
"""Distance in metres by which a measured surface may be outside of the target's box."""
MANY = 4
"""Numbers of frames from this one on are one group."""


def condition(which: Which) -> Condition:
    """The condition of an evaluation with one frame's geometry removed."""
    options = {"removed_frame": [which, COLUMNS, ROWS, MARGIN]}
    return Condition(f"removed_{which}", "fused", lambda processor, *_: RemovedFrame(processor, which), options)


class RemovedFrame:
    """A processor that removes the points of one frame of a sample, and keeps its pixels.

    Args:
        processor: must have no feature cache; its geometry encoder takes point maps.
        which: which frame.
    """

    def __init__(self, processor: SampleProcessor, which: Which) -> None:
        self.processor, self.which = processor, which

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample; the points of the frame are NaN, as without measured depth."""
        features = self.processor(sample, with_answer)
        inputs = features.visual
        assert inputs.cached_3d is None, "the processor has no feature cache"
        frame = removed_frame(rays_on_target(sample), self.which)
        if frame is None or inputs.geometry_frames is None:
            return features
        maps = inputs.geometry_frames.clone()
        maps[frame] = torch.nan
        return dataclasses.replace(features, visual=dataclasses.replace(inputs, geometry_frames=maps))


def removed_frame(rays: Sequence[int], which: Which) -> int | None:
    """Index of the frame that is removed; None if no frame shows the target, or every frame does (``other``).

    Args:
        rays: per frame, number of viewing rays that meet the target.
        which: which frame.
    """
    if not any(rays):
        return None
    if which == "target":
        return int(np.argmax(rays))
    return next((index for index, count in enumerate(rays) if not count), None)


def rays_on_target(sample: Sample) -> list[int]:
    """Per frame, the number of viewing rays that meet the target's surface; zeros for a sample without target.

    Raises:
        ValueError: a frame has no depth image or pose, or a file cannot be read.
    """
    if sample.target is None:
        return [0] * len(sample.frames)
    box = sample.target.box
    axes = euler_angles_to_matrix(box[6:])
    counts = []
    for path in sample.frames:
        frame, (width, height) = find_depth_frame(path, True), frame_size(path)
        columns, rows = (
            (np.arange(count) + 0.5) * side / count - 0.5 for count, side in ((COLUMNS, width), (ROWS, height))
        )
        pixels = np.stack(np.meshgrid(columns, rows), axis=-1)  # [ROWS, COLUMNS, 2]
        seen = camera_points(pixels, (width, height), read_depth(frame.depth), frame)
        pose = frame.cam_to_world
        from_centre = (seen @ pose[:3, :3].T + pose[:3, 3] - box[:3]) @ axes  # along the axes of the box
        inside = (np.abs(from_centre) <= box[3:6] / 2 + MARGIN).all(axis=-1)  # False for NaN
        counts.append(int(inside.sum()))
    return counts


def movement(
    before: Sequence[AnswerRecord],
    after: Sequence[AnswerRecord],
    rays: Sequence[Sequence[int]],
    which: Which,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How far answers move without the geometry of one frame.

    Args:
        before: records of the answers to the samples' own geometry.
        after: records of the same samples without the frame, in the same order.
        rays: per sample, `rays_on_target`.
        which: which frame was removed.
        resamples: resamples of the bootstrap over scenes.
        seed: its seed.

    Returns:
        ``samples`` (with such a frame), ``compared`` (with a box before and after), ``moved`` (mean distance in metres
        between the centres of the two boxes in the world), ``unchanged`` (share of answers with equal text), and the
        same by number of frames that show the target (``by_frames``: ``1`` ... ``4+``). Measures are ``value``,
        ``low``, ``high``, ``reason``.
    """
    rows = []
    for own, other, counts in zip(before, after, rays, strict=True):
        assert own["id"] == other["id"], "records of the same samples in the same order"
        if removed_frame(counts, which) is not None:
            shown = sum(count > 0 for count in counts)
            distance, same = _distance(own, other), own["text"] == other["text"]
            rows.append((str(own["scene_id"]), min(shown, MANY), distance, float(same)))
    groups = {number: [row for row in rows if row[1] == number] for number in sorted({row[1] for row in rows})}
    names = {number: str(number) if number < MANY else f"{MANY}+" for number in groups}
    by_frames = {names[number]: _measures(found, resamples, seed) for number, found in groups.items()}
    return {**_measures(rows, resamples, seed), "by_frames": by_frames}


def _distance(before: AnswerRecord, after: AnswerRecord) -> float:
    """Distance between the centres of two answers' boxes in the world, metres; NaN if one has no box."""
    boxes = answer_world_box(before), answer_world_box(after)
    if boxes[0] is None or boxes[1] is None:
        return float("nan")
    return float(np.linalg.norm(np.subtract(boxes[0], boxes[1])[:3]))


def _measures(rows: Sequence[tuple[str, int, float, float]], resamples: int, seed: int) -> dict[str, Any]:
    """Measures of rows (scene, number of frames, distance, whether the text is equal)."""
    compared = [row for row in rows if np.isfinite(row[2])]
    return {
        "samples": len(rows),
        "compared": len(compared),
        "moved": _mean([(row[0], row[2]) for row in compared], resamples, seed),
        "unchanged": _mean([(row[0], row[3]) for row in rows], resamples, seed),
    }


def _mean(values: Sequence[tuple[str, float]], resamples: int, seed: int) -> dict[str, Any]:
    """Mean of (scene, value) with its interval."""
    if not values:
        return asdict(Estimate(None, reason="no answer to compare"))
    bootstrap = SceneBootstrap([scene for scene, _ in values], resamples, seed)
    return asdict(bootstrap.score(Ratio(np.array([value for _, value in values]), np.ones(len(values)))))
