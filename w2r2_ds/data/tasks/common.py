"""Code shared by several tasks: ScanRefer's annotations, targets, number formatting, and object visibility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.frames.visibility import (
    keep_listed_frames,
    match_instance,
    visible_frames_by_depth,
    visible_frames_by_infos,
)
from w2r2_ds.data.sources.annotations import Description, read_scanrefer
from w2r2_ds.data.sources.embodiedscan import Infos, ScanInfo, read_infos
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.labels import LABELS_FILE, nyu40_class, read_labels, scannet_class, unique_or_multiple
from w2r2_ds.data.sources.proposals import BoxProposals, read_proposals
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.tasks.base import (
    NO_INSTANCE_MATCH,
    NO_VISIBLE_FRAME,
    TASKS,
    InputFile,
    Job,
    SkippedItem,
    Task,
    TaskOptions,
    by_scene,
)
from w2r2_ds.types.sample import Sample, Target
from w2r2_ds.utils.findings import Finding

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

SCANNET_ACCESS = "ScanNet: sign its terms of use (http://www.scan-net.org), then use its download script"
SCANREFER_ACCESS = "ScanRefer: fill in its form (https://github.com/daveredrum/ScanRefer)"
SCANQA_ACCESS = "ScanQA: its public download (https://github.com/ATR-DBI/ScanQA)"
EMBODIEDSCAN = "EmbodiedScan: fill in its form (https://github.com/OpenRobotLab/EmbodiedScan, data/README.md)"
PROPOSALS = (
    "metadata/scannet_val_pred_box.json of Video-3D-LLM's data "
    "(https://huggingface.co/datasets/zd11024/Video-3D-LLM_data); docs/guides/own-dataset.md has the format"
)


def infos_files(root: Path, split: str) -> list[Path]:
    """EmbodiedScan's file of a split; also the other split's file, if present.

    EmbodiedScan's splits may differ from ScanRefer's.
    """
    folder = root / "embodiedscan"
    own, other = (folder / f"embodiedscan_infos_{name}.pkl" for name in (split, "val" if split == "train" else "train"))
    return [own, other] if other.is_file() else [own]


def proposals_file(root: Path, split: str) -> Path:
    """File of detected boxes (proposals) of a split."""
    return root / "proposals" / f"scannet_{split}_pred_box.json"


def is_hidden(options: TaskOptions) -> bool:
    """Whether the split is ScanNet's hidden test split, whose scans have no boxes and no alignment."""
    return options.split == "test"


class DescriptionTask(Task):
    """Base of the tasks whose annotations are ScanRefer's descriptions: ScanRefer and Scan2Cap."""

    formats = ("vgllm", "video3dllm")
    splits = ("train", "val", "test")
    frame_protocol = "vgllm"

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        return InputFile(
            "annotations", root / "ScanRefer" / f"ScanRefer_filtered_{options.split}.json", SCANREFER_ACCESS
        )

    def other_files(self, root: Path, options: TaskOptions) -> list[InputFile]:
        return [] if is_hidden(options) else [InputFile("labels", root / LABELS_FILE, SCANNET_ACCESS)]

    def read(self, root: Path, options: TaskOptions) -> Sequence[Description]:
        return read_scanrefer(self.annotations(root, options).path, is_hidden(options))

    def jobs(self, root: Path, options: TaskOptions) -> tuple[Job, ...]:
        """One job per scene, with groups and classes of its objects, and the infos and proposals that the task needs.

        The groups ``unique`` and ``multiple`` are computed from all annotations of the split, so skipped items count
        too, as in ScanRefer.
        """
        if is_hidden(options):
            return super().jobs(root, options)
        descriptions = self.read(root, options)
        labels = read_labels(root)
        groups_scannet = unique_or_multiple(descriptions, labels, scannet_class)
        groups_nyu40 = unique_or_multiple(descriptions, labels, nyu40_class)
        scenes = by_scene(descriptions)
        infos = _read_infos(root, options.split, scenes) if self.needs_infos(options) else None
        proposals = read_proposals(proposals_file(root, options.split)) if self.needs_proposals(options) else None
        jobs = []
        for number, (scene_id, items) in enumerate(scenes.items()):
            object_ids = {description.object_id for _, description in items}
            names = {description.object_name for _, description in items}
            jobs.append(
                Job(
                    scene_id,
                    number,
                    items,
                    groups={id_: (groups_scannet[scene_id, id_], groups_nyu40[scene_id, id_]) for id_ in object_ids},
                    classes={name: scannet_class(name, labels) for name in names},
                    info=None if infos is None else infos.get(scene_id),
                    proposals=None if proposals is None else proposals.get(scene_id),
                    problem=_infos_problem(scene_id, infos) or _proposals_problem(scene_id, proposals),
                    skipped_inputs=broken_boxes(scene_id, infos, proposals),
                )
            )
        return tuple(jobs)


def _read_infos(root: Path, split: str, scenes: Mapping[str, Any]) -> Infos:
    """EmbodiedScan's annotations of these scenes, from the split's file.

    As in VG-LLM, the other split's file is read too if some scenes are missing.
    """
    found = Infos()
    for path in infos_files(root, split):
        if not found or any(scene_id not in found for scene_id in scenes):
            infos = read_infos(path)
            # The split's own file takes precedence.
            found.update({scene_id: info for scene_id, info in infos.items() if scene_id not in found})
            found.broken = {**infos.broken, **found.broken}
    return found


def _infos_problem(scene_id: str, infos: Infos | None) -> str:
    """Why a scene has no EmbodiedScan annotations; empty if it has or needs none."""
    if infos is None or scene_id in infos:
        return ""
    missing = f"{scene_id}: EmbodiedScan's infos do not have this scene; pass --visibility depth"
    return infos.broken.get(scene_id, missing)


def _proposals_problem(scene_id: str, proposals: BoxProposals | None) -> str:
    """Why a scene has no proposals; empty if it has or needs none."""
    if proposals is None or scene_id in proposals:
        return ""
    missing = f"{scene_id}: the proposals do not have this scene; pass --boxes annotated"
    return proposals.broken.get(scene_id, missing)


def broken_instances(info: ScanInfo) -> tuple[Finding, ...]:
    """The instances that are skipped in EmbodiedScan's annotations of a scene."""
    return tuple(Finding("broken boxes in EmbodiedScan's infos", message) for message in info.broken_instances)


def broken_boxes(scene_id: str, infos: Infos | None, proposals: BoxProposals | None) -> tuple[Finding, ...]:
    """The boxes of a scene that are skipped in the infos and the proposals."""
    info = None if infos is None else infos.get(scene_id)
    instances = () if info is None else broken_instances(info)
    messages = () if proposals is None else proposals.broken_boxes.get(scene_id, ())
    return (*instances, *(Finding("broken boxes in the proposals", message) for message in messages))


def target_of(
    scene: Scene, job: Job, description: Description, ann_id: str = "", described: np.ndarray | None = None
) -> Target:
    """Target of a sample: the object of a description.

    Args:
        scene: scene of the object.
        job: groups and classes of the scene's objects.
        description: description of the object.
        ann_id: number of the description, if the sample is about one description.
        described: ``[6]`` box in the prompt of a caption.
    """
    group, group_nyu40 = job.groups[description.object_id]
    return Target(
        box=world_box(scene, description.object_id),
        object_id=description.object_id,
        object_name=description.object_name.replace("_", " "),
        group=group,
        group_nyu40=group_nyu40,
        scannet_class=job.classes[description.object_name],
        ann_id=ann_id,
        described=described,
    )


def frame_fields(frames: Sequence[Frame]) -> dict[str, Any]:
    """Keyword arguments ``frames`` and ``cam_to_world`` of a `Sample` with these frames; poses not read are NaN."""
    return {
        "frames": tuple(frame.color for frame in frames),
        "cam_to_world": np.stack([frame.cam_to_world for frame in frames]),
    }


def world_box(scene: Scene, object_id: int) -> np.ndarray:
    """``[9]`` float64 annotated box in the axis-aligned world: centre, size (metres), and angles that are 0."""
    return np.concatenate([scene.instances[object_id].box, np.zeros(3)])


def move_sample(sample: Sample, change: Similarity) -> Sample:
    """The sample with the poses and the target of a changed world; its texts and `objects` stay.

    `Target.described` becomes the axis-aligned box that encloses the turned one, the same box for a multiple of 90
    degrees.
    """
    target = sample.target
    if target is not None:
        described = target.described
        if described is not None:
            center = change.scale * change.rotation @ described[:3] + change.shift
            described = np.concatenate([center, change.scale * np.abs(change.rotation) @ described[3:]])
        target = replace(target, box=change.apply_box(target.box), described=described)
    poses = np.array([change.moved_pose(pose) for pose in sample.cam_to_world]).reshape(sample.cam_to_world.shape)
    return replace(sample, cam_to_world=poses, target=target)


def rounded(values: np.ndarray, decimals: int = 2) -> list[float]:
    """Rounded numbers; VG-LLM writes Python's ``repr`` of these floats (``3.0``, ``0.59``)."""
    return [round(float(value), decimals) for value in values]


def rounded_box(box: np.ndarray, decimals: int = 2) -> list[float]:
    """`rounded` of a ``[9]`` box. Sizes are clamped to 10**-decimals, because a zero-size box is invalid."""
    numbers = rounded(box, decimals)
    numbers[3:6] = [max(size, 10**-decimals) for size in numbers[3:6]]
    return numbers


@dataclass(frozen=True)
class ObjectVisibility:
    """Frames in which an object is visible.

    Attributes:
        frames: positions in ``scene.frames``.
        box: ``[9]`` world box whose projected area selects the clearest frame: EmbodiedScan's, or the annotated one.
            None if the annotated box matches no EmbodiedScan instance.
    """

    frames: frozenset[int]
    box: np.ndarray | None


def find_visible_frames(scene: Scene, job: Job, options: TaskOptions) -> tuple[Scene, dict[int, ObjectVisibility]]:
    """The scene, and the visibility of its objects by object id (empty if the task does not use it).

    With ``visibility`` embodiedscan, the returned scene has only the frames that EmbodiedScan lists, and positions
    refer to these.

    Raises:
        ValueError: the scene's frames are not those that EmbodiedScan lists, or a depth image cannot be read.
    """
    # Other tasks keep all frames and need neither EmbodiedScan's files nor depth images.
    if not TASKS.find(options.task).uses_visibility(options):
        return scene, {}
    if options.visibility == "embodiedscan":
        assert job.info is not None, "the plan gives every scene its EmbodiedScan infos"
        scene = keep_listed_frames(scene, job.info)
    return scene, _compute_visibility(scene, job, options)


def frames_or_skip(
    scene: Scene, description: Description, key: str, options: TaskOptions, visibility: Mapping[int, ObjectVisibility]
) -> list[int] | SkippedItem:
    """Positions in ``scene.frames`` of a sample's frames, or the skipped item if no selection is possible.

    Args:
        scene: scene returned by `find_visible_frames`.
        description: description of the sample's object.
        key: sample id; it seeds the draw of frames.
        options: task options.
        visibility: visibility returned by `find_visible_frames`.
    """
    visible = visibility.get(description.object_id)
    if visible is not None and visible.box is None:
        return SkippedItem(key, NO_INSTANCE_MATCH, description.location)
    chosen = select_frames(options.frames, scene, key, None if visible is None else visible.frames)
    return SkippedItem(key, NO_VISIBLE_FRAME, description.location) if chosen is None else chosen


def _compute_visibility(scene: Scene, job: Job, options: TaskOptions) -> dict[int, ObjectVisibility]:
    """Object id -> visibility, for the described objects."""
    boxes = {description.object_id: world_box(scene, description.object_id) for _, description in job.items}
    if options.visibility == "depth":
        frames_of_boxes = visible_frames_by_depth(scene, [box[:6] for box in boxes.values()])
        return {
            object_id: ObjectVisibility(frames, box)
            for (object_id, box), frames in zip(boxes.items(), frames_of_boxes, strict=True)
        }
    assert job.info is not None
    # EmbodiedScan lists its own instances, not ScanRefer's objects. They are the same if their boxes match.
    visibility: dict[int, ObjectVisibility] = {}
    for object_id, box in boxes.items():
        instance = match_instance(box[:6], job.info)
        if instance is None:
            visibility[object_id] = ObjectVisibility(frozenset(), None)
        else:
            visibility[object_id] = ObjectVisibility(visible_frames_by_infos(scene, job.info, instance), instance.box)
    return visibility
