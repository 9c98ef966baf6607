"""What a task makes of one scene: samples, and a record of whatever became none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from w2r2_ds.data.frames.selection import FrameOptions, choose
from w2r2_ds.data.frames.visibility import listed_frames, match_instance, seen_by_depth, seen_by_infos
from w2r2_ds.data.sources.annotations import Description, Question
from w2r2_ds.data.sources.embodiedscan import ScanInfo
from w2r2_ds.data.sources.scannet import Frame, Scene
from w2r2_ds.types.sample import Sample, Target

NO_INSTANCE_MATCH = "no_instance_match"
NO_VISIBLE_FRAME = "no_visible_frame"
NO_PROPOSAL = "no_proposal"
NO_WINDOW = "no_window"
BROKEN_SCENE = "broken_scene"
NO_BOX = "no_box"
Format = Literal["vgllm", "video3dllm"]
Split = Literal["train", "val", "test_w_obj", "test_wo_obj"]


@dataclass(frozen=True)
class TaskOptions:
    """What the samples of a task depend on, besides the data; the launcher says what each is for.

    Attributes:
        task: scanrefer, scan2cap, scanqa or detection.
        split: of the annotations.
        format: whose prompts and answers.
        frames: which frames a sample sees; detection takes only count and seed.
        rolls: ScanRefer: training samples per description, each with frames of its own.
        visibility: where the options look for objects: what says whether a frame sees one.
        boxes: Scan2Cap, validation: where the coordinates of the prompt come from.
        interval: detection: every how many frames of a run of neighbours a window takes one.
        step: detection: distance of the numbers of neighbouring frames.
        windows: detection: the most windows of a scene; 0 for all.
    """

    task: str
    split: Split
    format: Format = "vgllm"
    frames: FrameOptions = field(default_factory=lambda: FrameOptions("vgllm", 32))
    rolls: int = 1
    visibility: Literal["embodiedscan", "depth"] = "embodiedscan"
    boxes: Literal["proposals", "annotated"] = "proposals"
    interval: int = 3
    step: int = 10
    windows: int = 0

    @property
    def looks(self) -> bool:
        """Whether what frames see decides something: the frame of an answer, or a training sample's set of frames."""
        if self.task == "scanrefer" and self.format == "vgllm":
            return True
        sets = self.split == "train" and self.frames.protocol == "scene_sets"
        return sets and self.task in ("scanrefer", "scan2cap")


@dataclass(frozen=True)
class Job:
    """Everything that one scene's samples are made of, besides the scene.

    Attributes:
        scene_id: ScanNet scene name.
        number: of the scene in its split, from 0.
        descriptions: with their numbers in the annotation file, from 0.
        questions: likewise.
        groups: object id -> unique or multiple by ScanNet's 18 classes, and by NYU40's ids.
        classes: object name -> 0 to 16 for ScanNet's named classes, 17 for others.
        info: what EmbodiedScan says about the scene, where the task asks for it.
        proposals: ``[N, 6]`` float64 proposed boxes, axis-aligned world, where the task asks for them.
    """

    scene_id: str
    number: int = 0
    descriptions: tuple[tuple[int, Description], ...] = ()
    questions: tuple[tuple[int, Question], ...] = ()
    groups: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    info: ScanInfo | None = None
    proposals: np.ndarray | None = None


@dataclass(frozen=True)
class Dropped:
    """An item that became no sample.

    Attributes:
        id: of the sample, or of the item where none of its samples could be made.
        reason: one of a few words that can be counted.
        where: file, line and entry that it came from.
        detail: a sentence, where the reason does not say it all.
    """

    id: str
    reason: str
    where: str
    detail: str = ""


PreparedItem = Sample | Dropped
Outcomes = list[tuple[int, PreparedItem]]
"""What items became, each with the item's number in its file."""


class WrongAnnotations(ValueError):
    """Annotations that do not belong to these scans.

    Attributes:
        sentences: what is wrong, each with file, line and field.
    """

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


def check_objects(scene: Scene, job: Job) -> None:
    """Refuse object ids that the scene lacks.

    Raises:
        WrongAnnotations: all of them.
    """
    named = [(d.object_id, "object_id", d.where) for _, d in job.descriptions]
    named += [(number, "object_ids", q.where) for _, q in job.questions for number in q.object_ids]
    lacking = [
        f"{where}: field {name!r} is {number}, which scene {scene.scene_id} does not have in "
        f"{scene.scene_id}_aligned_bbox.npy; use the annotations that belong to these scans, and boxes of "
        "launchers/prepare.py boxes (ScanRefer's own leave out walls, floors, ceilings and unlabelled objects)"
        for number, name, where in named
        if number not in scene.instances
    ]
    if lacking:
        raise WrongAnnotations(lacking)


def part_by_boxes(scene: Scene, job: Job) -> tuple[Job, Job]:
    """The items of a job whose objects all have a box, and those that name one without."""

    def has(*numbers: int) -> bool:
        return all(number in scene.instances for number in numbers)

    kept, left = (
        replace(
            job,
            descriptions=tuple(each for each in job.descriptions if has(each[1].object_id) is wanted),
            questions=tuple(each for each in job.questions if has(*each[1].object_ids) is wanted),
        )
        for wanted in (True, False)
    )
    return kept, left


def target_of(
    scene: Scene, job: Job, about: Description, ann_id: str = "", described: np.ndarray | None = None
) -> Target:
    """The object that a description is about."""
    group, group_nyu40 = job.groups[about.object_id]
    return Target(
        box=world_box(scene, about.object_id),
        object_id=about.object_id,
        object_name=about.object_name.replace("_", " "),
        group=group,
        group_nyu40=group_nyu40,
        scannet_class=job.classes[about.object_name],
        ann_id=ann_id,
        described=described,
    )


def shown(frames: Sequence[Frame]) -> dict[str, Any]:
    """``frames`` and ``cam_to_world`` of a sample that sees these, in this order."""
    return {
        "frames": tuple(frame.color for frame in frames),
        "cam_to_world": np.stack([frame.cam_to_world for frame in frames]),
    }


def world_box(scene: Scene, object_id: int) -> np.ndarray:
    """``[9]`` float64 annotated box: axis-aligned, so its angles are 0."""
    return np.concatenate([scene.instances[object_id].box, np.zeros(3)])


def rounded(values: np.ndarray, decimals: int = 2) -> list[float]:
    """Numbers as VG-LLM writes them: Python's ``repr`` of these floats (``3.0``, ``0.59``)."""
    return [round(float(value), decimals) for value in values]


def rounded_box(box9: np.ndarray, decimals: int = 2) -> list[float]:
    """``rounded`` of a ``[9]`` box; a side that would be 0, which is no box, is one unit of the last digit."""
    numbers = rounded(box9, decimals)
    numbers[3:6] = [max(size, 10**-decimals) for size in numbers[3:6]]
    return numbers


@dataclass(frozen=True)
class Sight:
    """Positions in ``scene.frames`` that see an object, and the ``[9]`` box whose outline says how well.

    ``box`` is None where the annotated box matches no EmbodiedScan instance.
    """

    seen: frozenset[int]
    box: np.ndarray | None


def look(scene: Scene, job: Job, options: TaskOptions) -> tuple[Scene, dict[int, Sight]]:
    """The scene's frames that count, and what they see, by object id; nothing is looked at where nothing depends on it.

    Raises:
        ValueError: the scene's frames are not those that EmbodiedScan lists, or an image cannot be read.
    """
    if not options.looks:
        return scene, {}
    if options.visibility == "embodiedscan":
        assert job.info is not None, "the plan gives every scene its EmbodiedScan infos"
        scene = listed_frames(scene, job.info)
    return scene, _sights(scene, job, options)


def choose_seeing(
    scene: Scene, about: Description, key: str, options: TaskOptions, sights: Mapping[int, Sight]
) -> list[int] | Dropped:
    """Positions of a sample's frames; of them, one sees the object where the options look for it."""
    sight = sights.get(about.object_id)
    if sight is not None and sight.box is None:
        return Dropped(key, NO_INSTANCE_MATCH, about.where)
    chosen = choose(options.frames, scene, key, None if sight is None else sight.seen)
    return Dropped(key, NO_VISIBLE_FRAME, about.where) if chosen is None else chosen


def _sights(scene: Scene, job: Job, options: TaskOptions) -> dict[int, Sight]:
    """Of every object that a description is about."""
    boxes = {about.object_id: world_box(scene, about.object_id) for _, about in job.descriptions}
    if options.visibility == "depth":
        seen = seen_by_depth(scene, [box[:6] for box in boxes.values()])
        return {number: Sight(each, box) for (number, box), each in zip(boxes.items(), seen, strict=True)}
    assert job.info is not None
    sights = {}
    for number, box in boxes.items():
        instance = match_instance(box[:6], job.info)
        if instance is None:
            sights[number] = Sight(frozenset(), None)
        else:
            sights[number] = Sight(seen_by_infos(scene, job.info, instance), instance.box)
    return sights
