"""Scan2Cap: the position of an object -> a description of it. Its annotations are ScanRefer's.

Format ``vgllm``: the position is the centre of the box in the camera of the first frame, metres (LaVi-Lab/VG-LLM
``process_scan2cap.py``). As in VG-LLM, the frames need not show the object, except in training with the frame protocol
``scene_sets``, where one does. Format ``video3dllm``: the centre in the axis-aligned world. Video-3D-LLM replaces
``<coord>`` in its prompt by a position embedding; here the numbers are written as text, with option `decimals`.

Training: one sample per description, at the annotated box. Validation: one sample per object (``scene|object|name`` of
the annotations), at the detected box with the largest IoU, or at the annotated one; all descriptions of the object are
references.

Test: ScanNet's hidden scans have no annotated objects. Every proposed box of a scene gives a sample
``scene|index of the box``, without references. The index counts broken boxes too, which are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.sources.annotations import Description
from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.proposals import BoxProposals, read_proposals
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.tasks.base import (
    NO_PROPOSAL,
    InputFile,
    Job,
    PreparedItem,
    PreparedItems,
    SkippedItem,
    TaskOptions,
    by_scene,
    is_validation,
    register_task,
)
from w2r2_ds.data.tasks.common import (
    PROPOSALS,
    DescriptionTask,
    ObjectVisibility,
    broken_boxes,
    find_visible_frames,
    frame_fields,
    frames_or_skip,
    is_hidden,
    move_sample,
    proposals_file,
    rounded,
    target_of,
)
from w2r2_ds.types.sample import Kind, Reference, Sample

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

QUESTION = "\nCarefully watch the video and describe the object located at {place} in detail."
"""VG-LLM's prompt; the line break separates it from the frames."""
WORLD_QUESTION = "Given an object located at {place} , describe the object in detail."
"""Video-3D-LLM's prompt, with its space before the comma."""


def question_text(box: np.ndarray, cam_to_world: np.ndarray | None = None, decimals: int = 2) -> str:
    """The text of the prompt after the frames.

    Args:
        box: ``[9]`` world box of the object.
        cam_to_world: ``[4, 4]`` of the first frame; None for world coordinates.
        decimals: digits to round world coordinates to.
    """
    if cam_to_world is None:
        return WORLD_QUESTION.format(place=rounded(box[:3], decimals))
    return QUESTION.format(place=rounded(world_to_camera(box, cam_to_world)[:3]))


def best_proposal(proposals: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The proposal ``[6]`` with the largest IoU with an axis-aligned box; of equal IoUs (also 0) the first.

    Args:
        proposals: ``[N, 6]`` centre and size, N at least 1; metres.
        box: ``[6]`` centre and size.
    """
    low = np.maximum(proposals[:, :3] - proposals[:, 3:] / 2, box[:3] - box[3:] / 2)
    high = np.minimum(proposals[:, :3] + proposals[:, 3:] / 2, box[:3] + box[3:] / 2)
    common = np.clip(high - low, 0, None).prod(1)
    # Video-3D-LLM and VG-LLM add 1e-8 to the denominator; volumes of objects are far larger, so the argmax is the same.
    iou = common / (proposals[:, 3:].prod(1) + box[3:].prod() - common)
    best: np.ndarray = proposals[int(iou.argmax())]
    return best


@dataclass(frozen=True)
class ProposedObject:
    """A detected box to describe, of the hidden test split; implements ``data.tasks.base.Item``.

    Attributes:
        scene_id: ScanNet scene name.
        index: index of the box in the scene's list in the file of proposals.
        box: ``[6]`` centre and size, metres.
        location: file and box, for messages.
    """

    scene_id: str
    index: int
    box: np.ndarray
    location: str

    object_ids: ClassVar[tuple[int, ...]] = ()
    object_field: ClassVar[str] = ""

    @property
    def key(self) -> str:
        """Id of the sample."""
        return f"{self.scene_id}|{self.index}"


def proposed_objects(proposals: BoxProposals, path: Path) -> list[ProposedObject]:
    """All valid boxes of a file of proposals."""
    return [
        ProposedObject(scene_id, index, box, f"{path}: {scene_id}[{index}]")
        for scene_id, boxes in proposals.items()
        for index, box in zip(proposals.indices[scene_id], boxes, strict=True)
    ]


def _hidden_sample(scene: Scene, proposed: ProposedObject, options: TaskOptions) -> Sample:
    """A sample of the hidden test split."""
    chosen = select_frames(options.frames, scene, proposed.key, None)
    assert chosen is not None, "without visibility, frames are always found"
    first = scene.frames[chosen[0]].cam_to_world
    box = np.concatenate([proposed.box, np.zeros(3)])
    return Sample(
        id=proposed.key,
        task="scan2cap",
        scene_id=proposed.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(box, first if options.format == "vgllm" else None, options.decimals),
        answer="",
    )


def object_key(description: Description) -> str:
    """Scan2Cap's id of an object: ``"scene0000_00|39|office_chair"``."""
    return f"{description.scene_id}|{description.object_id}|{description.object_name}"


def _sample(
    scene: Scene,
    job: Job,
    description: Description,
    options: TaskOptions,
    visibility: Mapping[int, ObjectVisibility],
    key: str,
    references: tuple[Reference, ...] = (),
) -> PreparedItem:
    described = scene.instances[description.object_id].box
    if options.split != "train" and options.boxes == "proposals":
        assert job.proposals is not None
        described = best_proposal(job.proposals, described)
    chosen = frames_or_skip(scene, description, key, options, visibility)
    if isinstance(chosen, SkippedItem):
        return chosen
    first = scene.frames[chosen[0]].cam_to_world if options.format == "vgllm" else None
    return Sample(
        id=key,
        task="scan2cap",
        scene_id=description.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(np.concatenate([described, np.zeros(3)]), first, options.decimals),
        answer=description.text.capitalize(),
        target=target_of(
            scene, job, description, description.ann_id if options.split == "train" else "", described.copy()
        ),
        references=references,
    )


@register_task
class Scan2Cap(DescriptionTask):
    """An object given by its position -> a sentence about it."""

    name = "scan2cap"
    published: ClassVar = {"train": 36665, "val": 2068}
    cli_options = (*DescriptionTask.cli_options, "decimals")

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        if is_hidden(options):
            return InputFile("annotations", proposals_file(root, options.split), PROPOSALS)
        return super().annotations(root, options)

    def read(self, root: Path, options: TaskOptions) -> Sequence[Any]:
        if is_hidden(options):
            path = self.annotations(root, options).path
            return proposed_objects(read_proposals(path), path)
        return super().read(root, options)

    def jobs(self, root: Path, options: TaskOptions) -> tuple[Job, ...]:
        if not is_hidden(options):
            return super().jobs(root, options)
        path = self.annotations(root, options).path
        proposals = read_proposals(path)
        jobs = [
            Job(scene_id, number, items, skipped_inputs=broken_boxes(scene_id, None, proposals))
            for number, (scene_id, items) in enumerate(by_scene(proposed_objects(proposals, path)).items())
        ]
        broken = enumerate(proposals.broken.items(), start=len(jobs))
        return (*jobs, *(Job(scene_id, number, problem=message) for number, (scene_id, message) in broken))

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        """Samples and skipped items: one per description (training) or per object, in the order of the file."""
        if is_hidden(options):
            return [(number, _hidden_sample(scene, proposed, options)) for number, proposed in job.items]
        scene, visibility = find_visible_frames(scene, job, options)
        if options.split == "train":
            return [
                (number, _sample(scene, job, description, options, visibility, description.key))
                for number, description in job.items
            ]
        objects: dict[str, list[tuple[int, Description]]] = {}
        for number, description in job.items:
            objects.setdefault(object_key(description), []).append((number, description))
        prepared: PreparedItems = []
        for key, descriptions in objects.items():
            number, first = descriptions[0]
            if options.boxes == "proposals" and (job.proposals is None or not len(job.proposals)):
                prepared.append((number, SkippedItem(key, NO_PROPOSAL, first.location)))
                continue
            references = tuple(Reference(description.text, description.words) for _, description in descriptions)
            prepared.append((number, _sample(scene, job, first, options, visibility, key, references)))
        return prepared

    def kind(self, options: TaskOptions) -> Kind:
        return "caption"

    def change_world(self, sample: Sample, change: Similarity) -> Sample:
        moved = move_sample(sample, change)
        assert sample.target is not None and sample.target.described is not None, "a caption describes a box"
        assert moved.target is not None and moved.target.described is not None
        box, changed = (np.concatenate([each.described, np.zeros(3)]) for each in (sample.target, moved.target))
        # The format of a sample is not stored, but its question has the position in one of two coordinate systems.
        if sample.question == question_text(box, decimals=sample.decimals):
            return replace(moved, question=question_text(changed, decimals=sample.decimals))
        return replace(moved, question=question_text(changed, moved.cam_to_world[0]))

    def unit(self, options: TaskOptions) -> str:
        return "descriptions" if options.split == "train" else "objects"

    def items(self, job: Job, options: TaskOptions) -> list[tuple[int, str, str]]:
        if not is_validation(options.split):
            return super().items(job, options)
        first: dict[str, tuple[int, str, str]] = {}
        for number, description in job.items:
            key = object_key(description)
            first.setdefault(key, (number, key, description.location))
        return list(first.values())

    def uses_visibility(self, options: TaskOptions) -> bool:
        return options.split == "train" and options.frames.protocol == "scene_sets"

    def scene_parts(self, options: TaskOptions) -> SceneParts:
        # Format vgllm: the position is in the camera of the first frame.
        boxes = SceneParts.NONE if is_hidden(options) else SceneParts.BOXES
        return boxes | (SceneParts.POSES if options.format == "vgllm" else SceneParts.NONE)

    def needs_proposals(self, options: TaskOptions) -> bool:
        return is_validation(options.split) and options.boxes == "proposals"

    def recorded_options(self, options: TaskOptions) -> dict[str, Any]:
        recorded: dict[str, Any] = {"boxes": options.boxes} if is_validation(options.split) else {}
        return recorded if options.format == "vgllm" else {**recorded, "decimals": options.decimals}
