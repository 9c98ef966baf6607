"""Base class and registry of tasks, and the records of their preparation.

A task is one file: a subclass of `Task` with ``@register_task``. Importing the package ``w2r2_ds.data.tasks`` registers
the built-in tasks; the option ``--plugin`` registers those of users.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from w2r2_ds.data.frames.selection import FrameOptions, FrameSampling
from w2r2_ds.data.sources.embodiedscan import ScanInfo
from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.types.sample import BoxFormat, Kind, Sample
from w2r2_ds.utils.findings import Finding
from w2r2_ds.utils.registry import Registry

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

# Reasons of skipped items, explained in docs/reference/data-formats.md
NO_INSTANCE_MATCH = "no_instance_match"
NO_VISIBLE_FRAME = "no_visible_frame"
NO_PROPOSAL = "no_proposal"
NO_WINDOW = "no_window"
UNSEEN = (NO_INSTANCE_MATCH, NO_VISIBLE_FRAME)
"""Reasons of items that no frame shows; objects without an EmbodiedScan instance are in none of its lists."""
BROKEN_SCENE = "broken_scene"
BROKEN_BOX = "broken_box"
NO_BOX = "no_box"


@dataclass(frozen=True)
class TaskOptions:
    """Options of the preparation of one task and split; ``w2r2 prepare TASK --help`` explains them.

    Attributes:
        task: name of a registered task.
        split: annotation split.
        format: prompt and answer format, one of ``Task.formats``.
        frames: frame selection; detection uses only count and seed.
        rolls: training samples per description (ScanRefer), each with other frames.
        visibility: source of object visibility: EmbodiedScan's lists, or the depth images.
        boxes: box whose centre is in the prompt (Scan2Cap, validation): the best proposal, or the annotated box.
        box_angles: which of the four equal descriptions of a box is the answer (ScanRefer, format vgllm): the annotated
            one as in VG-LLM, or the one nearest to the camera's heading.
        decimals: digits after the decimal point of world coordinates (format video3dllm), 1 or 2.
        interval: spacing of a window's frames in a run of neighbouring frames (detection).
        step: difference of the numbers of neighbouring frames (detection).
        windows: maximum number of windows per scene (detection); 0 for all.
    """

    task: str
    split: str
    format: str = "vgllm"
    frames: FrameOptions = field(default_factory=FrameOptions)
    rolls: int = 1
    visibility: Literal["embodiedscan", "depth"] = "embodiedscan"
    boxes: Literal["proposals", "annotated"] = "proposals"
    box_angles: Literal["vgllm", "nearest_heading"] = "vgllm"
    decimals: int = 2
    interval: int = 3
    step: int = 10
    windows: int = 0


@dataclass(frozen=True)
class Job:
    """Annotations of one scene, the unit of work of a preparation process.

    Attributes:
        scene_id: ScanNet scene name.
        number: index of the scene in the split, in the order in which the annotations first name the scenes.
        items: annotations of the scene, each with its number in the annotation file, from 0.
        groups: object id -> group (``unique`` or ``multiple``) by ScanNet's 18 classes, and by NYU40 ids.
        classes: object name -> 0 to 16 for ScanNet's named classes, 17 for others.
        info: EmbodiedScan's annotations of the scene; None if the task does not need them.
        proposals: ``[N, 6]`` float64 detected boxes (centre, size; axis-aligned world, metres); None if not needed.
        problem: why the scene cannot be prepared: a file of all scenes lacks it, or its record there is broken.
        skipped_inputs: broken boxes of the scene in EmbodiedScan's infos and in the proposals.
    """

    scene_id: str
    number: int = 0
    items: tuple[tuple[int, Any], ...] = ()
    groups: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    info: ScanInfo | None = None
    proposals: np.ndarray | None = None
    problem: str = ""
    skipped_inputs: tuple[Finding, ...] = ()


def is_validation(split: str) -> bool:
    """Whether a split is ``val`` or another validation split, ``val_NAME``, with annotation files of its own."""
    return re.fullmatch(r"val(_[a-z0-9_]+)?", split) is not None


class Item(Protocol):
    """One annotation, e.g. a description or a question."""

    @property
    def scene_id(self) -> str: ...
    @property
    def key(self) -> str:
        """Id, unique in the annotation file."""

    @property
    def location(self) -> str:
        """File and entry, for messages."""

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Ids of the objects whose boxes the samples need; each must have a box in the scene."""

    object_field: ClassVar[str]
    """Field of the annotation file that contains `object_ids`, for messages."""


@dataclass(frozen=True)
class InputFile:
    """An input file of a preparation.

    Attributes:
        name: content: annotations, labels, infos, proposals, frames, or a file of a scene.
        path: path of the file.
        origin: source for a download, or the command that writes it.
    """

    name: str
    path: Path
    origin: str


@dataclass(frozen=True)
class SkippedItem:
    """An annotation without a sample; a line of skipped.jsonl.

    Attributes:
        id: sample id, or annotation id if none of its samples could be made.
        reason: one of the constants above.
        location: file and entry of the annotation.
        detail: message of the error, if there is one.
    """

    id: str
    reason: str
    location: str
    detail: str = ""


PreparedItem = Sample | SkippedItem
PreparedItems = list[tuple[int, PreparedItem]]
"""Samples and skipped items of a scene, each with the number of its annotation in the annotation file."""


class AnnotationMismatch(ValueError):
    """Annotations of objects that the scene does not have.

    Attributes:
        messages: one per item, with file, entry and field.
    """

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Task(ABC):
    """Annotation files, prompts, answers, parsing, similarity and preparation of one task.

    Stateless: every method takes the options. Scoring protocols are registered separately with ``register_protocol``
    (``evaluation/protocols``); a plug-in may do both in one file.

    Attributes:
        name: used on the command line, in manifests and in samples.
        formats: prompt and answer formats, named after the projects that define them; the first is the default.
        splits: annotation splits; besides these, every task has further validation splits ``val_NAME``.
        published: split -> number of items in the complete annotation file, if known.
        cli_options: options of ``w2r2 prepare NAME`` besides those of all tasks, a subset of
            ``commands.prepare_data.TASK_OPTIONS``.
        frame_protocol: default of ``--frames.protocol``.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = ("vgllm",)
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    published: ClassVar[Mapping[str, int]] = {}
    cli_options: ClassVar[tuple[str, ...]] = ("format", "frames", "visibility", "boxes", "skip_without_box")
    frame_protocol: ClassVar[FrameSampling] = "uniform"

    @abstractmethod
    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        """The annotation file, whose entries become samples. Its ``origin`` is printed if it is missing."""

    @abstractmethod
    def read(self, root: Path, options: TaskOptions) -> Sequence[Item]:
        """All items of the annotation file, in its order; raises ``ValueError`` with file, entry and field."""

    @abstractmethod
    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        """Samples and skipped items of one scene, each with the number of its item."""

    def kind(self, options: TaskOptions) -> Kind:
        """Kind of the answers. It determines the *where* tokens and the similarity s (IoU of boxes, else of words)."""
        return "answer"

    def box_format(self, options: TaskOptions) -> BoxFormat:
        """Numbers of the answers, in the order of their text, if the kind is ``grounding``."""
        return "camera"

    def parse(self, text: str, frame_count: int, box_format: BoxFormat = "camera") -> Any:
        """Parse a generated answer.

        Args:
            text: without special tokens.
            frame_count: number of frames of the sample.
            box_format: box format of the sample; not used if the kind is not ``grounding``.

        Returns:
            If the kind is ``grounding``, a `Grounding` for box format ``camera`` and a `WorldGrounding` for ``world``;
            else what the task's scoring protocols take.

        Raises:
            AnswerError: the text is not an answer of this task.
        """
        return text

    def text_similarity(self, prediction: str, reference: str) -> float | None:
        """Similarity s of an answer in words to its label, in [0, 1].

        None (default) selects ``objective.caption_similarity`` or ``objective.answer_similarity``, by kind.
        """
        return None

    def change_world(self, sample: Sample, change: Similarity) -> Sample:
        """The sample after a change of its world in which the cameras move along (`data.geometry_augmentation`).

        Poses, boxes and every coordinate in the question and the answer change; `tasks.common.move_sample` does it for
        poses and target. Coordinates of a camera show the scale only (`Similarity.in_moved_camera`).
        """
        raise ValueError(f"Task {self.name} does not define Task.change_world.")

    @property
    def can_change_world(self) -> bool:
        """Whether the task defines `change_world`."""
        return type(self).change_world is not Task.change_world

    def unit(self, options: TaskOptions) -> str:
        """Plural noun for the counted items, for messages and the manifest."""
        return "items"

    def count(self, jobs: Sequence[Job], options: TaskOptions) -> int:
        """Number of items, to compare with `published`."""
        return sum(len(self.items(job, options)) for job in jobs)

    def items(self, job: Job, options: TaskOptions) -> list[tuple[int, str, str]]:
        """(number, id, location) of every item of a scene."""
        return [(number, item.key, item.location) for number, item in job.items]

    def jobs(self, root: Path, options: TaskOptions) -> tuple[Job, ...]:
        """One job per scene, in the order in which the annotations first name the scenes."""
        return tuple(
            Job(scene_id, number, items)
            for number, (scene_id, items) in enumerate(by_scene(self.read(root, options)).items())
        )

    def other_files(self, root: Path, options: TaskOptions) -> list[InputFile]:
        """Input files besides the annotations, EmbodiedScan's infos and the proposals."""
        return []

    def uses_visibility(self, options: TaskOptions) -> bool:
        """Whether samples depend on the frames in which an object is visible."""
        return False

    def determines_visibility(self, options: TaskOptions) -> bool:
        """Whether it is known of every item if a frame shows it; the summary then has the number of unseen ones."""
        return self.uses_visibility(options)

    def is_unseen(self, item: PreparedItem) -> bool:
        """Whether no frame of an item shows its object. Only asked if `determines_visibility`."""
        if isinstance(item, SkippedItem):
            return item.reason in UNSEEN
        return item.target is not None and not item.answer  # validation keeps such items, with an empty label

    def scene_parts(self, options: TaskOptions) -> SceneParts:
        """Files of a scene that `make_samples` uses besides the colour images; no others have to exist.

        What the selection of frames and the visibility of objects need is added by `parts_to_read`.
        """
        return SceneParts.NONE

    def needs_infos(self, options: TaskOptions) -> bool:
        """Whether EmbodiedScan's infos are an input file."""
        return self.uses_visibility(options) and options.visibility == "embodiedscan"

    def needs_proposals(self, options: TaskOptions) -> bool:
        """Whether the file of detected boxes is an input file."""
        return False

    def recorded_options(self, options: TaskOptions) -> dict[str, Any]:
        """Options that the samples depend on, besides split, format, frames and visibility."""
        return {}

    def default_rolls(self, options: TaskOptions) -> int:
        """Value of ``options.rolls`` if the command line does not set it."""
        return 1


TASKS: Registry[Task] = Registry("task")


def register_task(task: type[Task]) -> type[Task]:
    """Class decorator that adds a task to `TASKS`; raises ``ValueError`` if another task has its name."""
    TASKS.register(task.name, task())
    return task


def parts_to_read(options: TaskOptions) -> SceneParts:
    """Files of a scene that a preparation reads: those of the task, the selection of frames, and the visibility."""
    task = TASKS.find(options.task)
    parts = task.scene_parts(options)
    if options.frames.protocol == "coverage":
        parts |= SceneParts.POSES | SceneParts.DEPTH
    if task.uses_visibility(options):
        # EmbodiedScan's poses are compared with those of the frames, and its boxes with those of the scene.
        parts |= SceneParts.POSES | SceneParts.BOXES
        if options.visibility == "depth":
            parts |= SceneParts.DEPTH
    return parts


def by_scene(items: Sequence[Item]) -> dict[str, tuple[tuple[int, Any], ...]]:
    """Scene -> its items with their numbers; scenes in order of appearance."""
    scenes: dict[str, list[tuple[int, Any]]] = {}
    for number, item in enumerate(items):
        scenes.setdefault(item.scene_id, []).append((number, item))
    return {scene_id: tuple(numbered) for scene_id, numbered in scenes.items()}


def check_objects(scene: Scene, job: Job) -> None:
    """Raise ``AnnotationMismatch`` with a message for every object that an item refers to and the scene lacks."""
    messages = [
        f"{item.location}: field {item.object_field!r} is {object_id}, which scene {scene.scene_id} does not have in "
        f"{scene.scene_id}_aligned_bbox.npy; use the annotations that belong to these scans, and boxes of "
        "launchers/prepare.py boxes (ScanRefer's own lack walls, floors, ceilings and unlabelled objects)"
        for _, item in job.items
        for object_id in item.object_ids
        if object_id not in scene.instances
    ]
    if messages:
        raise AnnotationMismatch(messages)


def split_by_objects(job: Job, is_usable: Callable[[int], bool]) -> tuple[Job, Job]:
    """The job of the items whose objects are all usable, and the job of the others.

    Args:
        job: job of a scene.
        is_usable: function of an object id.
    """

    def usable(item: Item) -> bool:
        return all(is_usable(object_id) for object_id in item.object_ids)

    kept = tuple((number, item) for number, item in job.items if usable(item))
    others = tuple((number, item) for number, item in job.items if not usable(item))
    return replace(job, items=kept), replace(job, items=others)
