"""Interventions do(F3D): the geometry of a sample is scaled, shifted or turned, and its pixels stay.

They need an encoder of point maps, whose input is the geometry itself (`models/geometry/point_map.py`). Answer and
points must be in coordinates in which the change is visible and has one meaning:

* *Scale*: the cameras move along, so the scale is all that camera coordinates show. World coordinates are scaled about
  the origin of the room.
* *Shift, turn*: the cameras stay. Points and answers must both be in camera, or both be in world coordinates. If points
  are in the world and answers in a camera, the camera's pose is known from the same points, and it is open whether a
  model should move the box or the camera.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from w2r2_ds.data.processor import Features
from w2r2_ds.data.tasks.parsing import AnswerError, parse_grounding, parse_world_box
from w2r2_ds.diagnostics.causality.measures import Answers
from w2r2_ds.evaluation.conditions import Condition, SampleProcessor
from w2r2_ds.evaluation.protocols.records import AnswerRecord, enclosing_box
from w2r2_ds.models.geometry.point_transforms import Similarity, change_point_maps, world_change
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample

Kind = Literal["scale", "shift", "turn"]


@dataclass(frozen=True)
class Intervention:
    """One change of the geometry of every sample.

    Attributes:
        kind: ``scale``, ``shift`` or ``turn``.
        amount: factor; metres along the world's x and y axis each; radians about the vertical axis, counter-clockwise
            from above.
    """

    kind: Kind
    amount: float

    @property
    def name(self) -> str:
        """Name of its condition, part of the names of files."""
        return f"{self.kind}_{self.amount:+.3g}" if self.kind != "scale" else f"scale_{self.amount:.3g}"

    @property
    def cameras_move(self) -> bool:
        """Whether the cameras move along with the world."""
        return self.kind == "scale"

    def change(self, cam_to_world: np.ndarray, box_format: str) -> Similarity:
        """The change of the world of one sample.

        Args:
            cam_to_world: ``[frames, 4, 4]`` camera poses.
            box_format: coordinates of the answers. In camera coordinates, a turn is about the centre of the cameras, so
                that objects stay at their distance; in world coordinates, it is about the origin of the room.
        """
        if self.kind == "scale":
            return world_change(scale=self.amount)
        if self.kind == "shift":
            return world_change(shift=(self.amount, self.amount, 0.0))
        if box_format == "world":
            return world_change(turn=self.amount)
        return world_change(turn=self.amount, origin=cam_to_world[:, :3, 3].mean(axis=0).tolist())

    def condition(self) -> Condition:
        """The condition of an evaluation with the changed geometry."""
        return Condition(
            self.name,
            "fused",
            lambda processor, geometry, _: ChangedPointMaps(processor, geometry, self),
            {"intervention": [self.kind, self.amount]},
        )


INTERVENTIONS = (
    *(Intervention("scale", factor) for factor in (0.7, 0.85, 1.15, 1.4)),
    *(Intervention("shift", metres) for metres in (-0.5, -0.25, 0.25, 0.5)),
    *(Intervention("turn", math.radians(degrees)) for degrees in (-30, -15, 15, 30)),
)
"""Changes in both directions, so that a tendency to one side does not look like a movement."""


def not_applicable(kind: Kind, geometry: GeometrySpec, box_format: str | None) -> str:
    """Why an intervention cannot be measured; empty if it can.

    Args:
        kind: kind of the intervention.
        geometry: input of the geometry encoder.
        box_format: coordinates of the boxes in the answers; None if answers are not boxes.
    """
    if box_format not in ("camera", "world"):
        return "the answers are not boxes, so there is no expected answer"
    if geometry.point_maps is None:
        return "the geometry encoder computes its geometry from the pixels, which stay; only point maps can be changed"
    points = geometry.point_maps.reference_frame
    if kind != "scale" and points != box_format:
        return (
            f"points are in the coordinates {points!r} and answers in {box_format!r}; whether box or camera should "
            "move is open (train with model.geometry.reference_frame in the answers' coordinates)"
        )
    return ""


class ChangedPointMaps:
    """A processor that changes the point maps of a sample and keeps its pixels.

    Args:
        processor: must have no feature cache.
        geometry: point maps of the encoder.
        intervention: the change.
    """

    def __init__(self, processor: SampleProcessor, geometry: GeometrySpec, intervention: Intervention) -> None:
        assert geometry.point_maps is not None, "checked by `not_applicable`"
        self.processor, self.intervention = processor, intervention
        self.reference_frame = geometry.point_maps.reference_frame

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample with changed `geometry_frames`; samples without frames are unchanged."""
        features = self.processor(sample, with_answer)
        inputs = features.visual
        assert inputs.cached_3d is None, "the processor has no feature cache"
        if inputs.geometry_frames is None:
            return features
        change = self.intervention.change(sample.cam_to_world, sample.box_format)
        changed = change_point_maps(
            inputs.geometry_frames, change, sample.cam_to_world, self.reference_frame, self.intervention.cameras_move
        )
        return dataclasses.replace(features, visual=dataclasses.replace(inputs, geometry_frames=changed))


def compare_answers(before: Sequence[AnswerRecord], after: Mapping[Intervention, Sequence[AnswerRecord]]) -> Answers:
    """Boxes of answers before and after interventions, and the expected ones.

    Args:
        before: records of the answers to the samples' own geometry.
        after: intervention -> records of the same samples, in the same order.

    Returns:
        One row per sample and intervention. Boxes are in the coordinates of the answers. Their angles are those of
        their rotation matrix, because equal rotations may have different angles.
    """
    rows = [
        _compare(intervention, own, changed)
        for intervention, records in after.items()
        for own, changed in zip(before, records, strict=True)
    ]
    stacked = np.array(rows)  # [rows, 3, 9]
    scenes = [str(record["scene_id"]) for _ in after for record in before]
    return Answers(scenes, stacked[:, 0], stacked[:, 1], stacked[:, 2])


def _compare(intervention: Intervention, before: AnswerRecord, after: AnswerRecord) -> tuple[np.ndarray, ...]:
    """Boxes before, after and expected, ``[9]`` each; NaN if one cannot be compared."""
    assert before["id"] == after["id"], "records of the same samples in the same order"
    none, same = np.full(9, np.nan), world_change()
    own, frame = answered_box(before)
    changed, other_frame = answered_box(after)
    if own is None:
        return none, none, none
    poses, form = np.array(before.get("cam_to_world") or ()), str(before["form"])
    change = intervention.change(poses, form)
    if form == "camera":
        change = change.in_moved_camera() if intervention.cameras_move else change.in_camera(poses[frame])
    expected = change.apply_box(own)
    first, last = same.apply_box(own), none
    if changed is not None and frame == other_frame:
        last = same.apply_box(changed)
    if form == "world":  # an axis-aligned box answers for a turned one with the box around it
        expected = np.concatenate([enclosing_box(expected.tolist()), np.zeros(3)])
        for box in (first, last, expected):
            box[6:] = np.nan
    return first, last, expected


def answered_box(record: AnswerRecord) -> tuple[np.ndarray | None, int]:
    """Box ``[9]`` of an answer in its own coordinates, None if it has none; and its frame, -1 for a world box."""
    text = record["text"] or ""
    try:
        if record["form"] == "world":
            return np.concatenate([parse_world_box(text), np.zeros(3)]), -1
        answer = parse_grounding(text, len(record["cam_to_world"]))
    except AnswerError:
        return None, -1
    return answer.box, answer.frame
