"""Intervention: the geometry of a paired room; the pixels stay.

The shifted splits of the shortcut benchmark have the same rooms, objects and sentences as ``val``, drawn with another
geometry. Here every sample of ``val`` keeps its pixels and gets the geometry of its paired sample. A model that reads
its answer from the geometry answers the box of the paired room.

The expected change of a number is the one between the annotated boxes of the two rooms. The rooms may differ in more
than one transformation (every object of ``furniture_scale`` has a factor of its own), so that there is no expected
change of a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.processor import Features
from w2r2_ds.diagnostics.causality.interventions import answered_box
from w2r2_ds.diagnostics.causality.measures import Answers
from w2r2_ds.diagnostics.row_cues import cues_of
from w2r2_ds.evaluation.conditions import Condition, SampleProcessor
from w2r2_ds.evaluation.datasets import all_samples, describe_sets, find_sets
from w2r2_ds.evaluation.protocols.records import AnswerRecord, enclosing_box
from w2r2_ds.evaluation.shuffle import with_geometry_of
from w2r2_ds.models.geometry.point_transforms import world_change
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample


@dataclass(frozen=True, eq=False)
class PairedRooms:
    """A shifted split, paired with the evaluated samples.

    Attributes:
        shift: name of the shift.
        folder: prepared set of the shifted split.
        manifest: SHA-256 of its manifest.
        samples: id of an evaluated sample -> sample of the shifted split, about the same object.
    """

    shift: str
    folder: Path
    manifest: str
    samples: Mapping[str, Sample]

    def condition(self) -> Condition:
        """The condition of an evaluation with the geometry of the paired rooms."""
        return Condition(
            f"paired_{self.shift}",
            "fused",
            lambda processor, geometry, _: PairedGeometry(processor, geometry, self.samples),
            {"paired": self.manifest},
        )


def find_pairs(config: DataConfig, folders: Sequence[Path], samples: Sequence[Sample]) -> list[PairedRooms]:
    """Pair evaluated samples with those of shifted splits.

    Args:
        config: data configuration; ``root`` is used.
        folders: prepared sets of shifted splits, relative to the working directory or to the root.
        samples: the evaluated samples.

    Raises:
        ValueError: a folder is not of a shifted split, a sample has no pair or one with other frames, or two folders
            have the same shift.
    """
    pairs = [_pair(config, folder, samples) for folder in folders]
    shifts = [each.shift for each in pairs]
    if repeated := [str(each.folder) for each in pairs if shifts.count(each.shift) > 1]:
        raise ValueError(f"--paired: {' and '.join(repeated)} have the same shift; diagnose them one by one.")
    return pairs


def _pair(config: DataConfig, data: Path, samples: Sequence[Sample]) -> PairedRooms:
    """The pairs of one shifted split."""
    sets = find_sets(config, None, data)
    cues = cues_of(sets)
    folder = sets[0].folder
    if not cues:
        raise ValueError(
            f"--paired: {folder} is no shifted split of scanrefer with cues in {config.root}; make one with w2r2 "
            "prepare synthetic --shift, and prepare its split val_NAME."
        )
    shifted = {sample.id: sample for sample in all_samples(sets)}
    pairs = {cue.paired_id: shifted[id_] for id_, cue in cues.items() if id_ in shifted}
    for sample in samples:
        if sample.id not in pairs:
            raise ValueError(f"--paired: {folder} has no sample that is paired with {sample.id!r}; prepare it again.")
        names = [[path.name for path in each.frames] for each in (sample, pairs[sample.id])]
        if names[0] != names[1]:
            raise ValueError(
                f"--paired: {sample.id!r} has the frames {', '.join(names[0])} and {pairs[sample.id].id!r} of {folder} "
                f"has {', '.join(names[1])}; prepare both with the same --frames.protocol uniform."
            )
    shift = next(iter(cues.values())).shift
    return PairedRooms(shift, folder, describe_sets(sets)[0]["manifest"], {each.id: pairs[each.id] for each in samples})


class PairedGeometry:
    """A processor that gives every sample the geometry of its paired sample, and keeps its pixels.

    Args:
        processor: must have no feature cache.
        geometry: patch size of the geometry encoder and kind of its input.
        pairs: id of a sample -> its paired sample, with as many frames.
    """

    def __init__(self, processor: SampleProcessor, geometry: GeometrySpec, pairs: Mapping[str, Sample]) -> None:
        self.processor, self.geometry, self.pairs = processor, geometry, pairs

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample with the paired sample's `geometry_frames`; samples without frames are unchanged."""
        features = self.processor(sample, with_answer)
        return with_geometry_of(features, self.pairs[sample.id].frames, self.geometry) if sample.frames else features


def compare_with_pairs(
    before: Sequence[AnswerRecord],
    after: Sequence[AnswerRecord],
    samples: Sequence[Sample],
    pairs: Mapping[str, Sample],
) -> Answers:
    """Boxes of answers to the samples' own and to the paired geometry, and the expected ones; a row per sample.

    Args:
        before: records of the answers to the samples' own geometry.
        after: records of the answers to the paired geometry, in the same order.
        samples: the samples, in the same order; each has a target.
        pairs: id of a sample -> its paired sample.
    """
    rows = [
        _compare(own, other, sample, pairs[sample.id])
        for own, other, sample in zip(before, after, samples, strict=True)
    ]
    stacked = np.array(rows)  # [rows, 3, 9]
    return Answers([sample.scene_id for sample in samples], stacked[:, 0], stacked[:, 1], stacked[:, 2])


def _compare(before: AnswerRecord, after: AnswerRecord, sample: Sample, paired: Sample) -> tuple[np.ndarray, ...]:
    """Boxes before, after and expected, ``[9]`` each; NaN if one cannot be compared."""
    assert before["id"] == after["id"] == sample.id, "records of the samples in their order"
    none = np.full(9, np.nan)
    own, frame = answered_box(before)
    changed, other_frame = answered_box(after)
    if own is None:
        return none, none, none
    canonical = world_change().apply_box  # the angles of the rotation matrix: equal rotations may have different angles
    change = canonical(annotated_box(paired, frame)) - canonical(annotated_box(sample, frame))
    own = canonical(own)
    last = canonical(changed) if changed is not None and frame == other_frame else none
    boxes = own, last, own + change
    if sample.box_format == "world":
        for box in boxes:
            box[6:] = np.nan  # a world box has no angles
    return boxes


def annotated_box(sample: Sample, frame: int) -> np.ndarray:
    """Box ``[9]`` of a sample's target in the coordinates of an answer: the world, or the camera of a frame."""
    assert sample.target is not None, "samples of a shifted split have a target"
    if sample.box_format == "world":
        return np.concatenate([enclosing_box(sample.target.box.tolist()), np.zeros(3)])
    return world_to_camera(sample.target.box, sample.cam_to_world[frame])
