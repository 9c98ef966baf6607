"""3D object detection in VG-LLM's format: a few neighbouring frames -> labels and boxes of all visible objects.

Boxes are in the camera of the first frame (OpenCV axes; centre and size in metres, ZXY angles in radians). The rules
are those of LaVi-Lab/VG-LLM ``process_threedod.py``. A sample is a window: 4 frames, every third frame of a run of
neighbouring frames. Windows overlap: one begins at every frame that is followed by enough neighbours. The objects are
EmbodiedScan's instances, ordered by the first frame that shows them, then by index, without walls, ceilings, floors and
instances labelled "object". Validation draws 10 windows per scene. The prompt is that of VG-LLM's code; the paper's
Table 9 has "box_3d" and "pitch, roll".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.data.frames.visibility import keep_listed_frames
from w2r2_ds.data.sources.embodiedscan import ScanInfo, read_infos
from w2r2_ds.data.sources.frames import Frame, SceneParts
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.tasks.base import (
    NO_WINDOW,
    InputFile,
    Job,
    PreparedItem,
    PreparedItems,
    SkippedItem,
    Task,
    TaskOptions,
    register_task,
)
from w2r2_ds.data.tasks.common import (
    EMBODIEDSCAN,
    broken_instances,
    frame_fields,
    infos_files,
    move_sample,
    rounded_box,
)
from w2r2_ds.data.tasks.parsing import parse_objects
from w2r2_ds.types.sample import BoxFormat, LabeledBox, Sample

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

QUESTION = (
    "\nDetect the 3D bounding boxes in the camera coordinate system of the first frame.\n"
    'Output a json list where each entry contains the object name in "label" and its 3D bounding box in "bbox_3d".\n'
    "The 3D bounding box format should be "
    "[x_center, y_center, z_center, x_size, y_size, z_size, yaw, roll, pitch]."
)
SKIPPED_LABELS = frozenset({"wall", "ceiling", "floor", "object"})


def answer_text(objects: Sequence[LabeledBox]) -> str:
    """JSON in a code block, one object per line, two decimals.

    Args:
        objects: labels, and ``[9]`` boxes in the first frame's camera.
    """
    lines = [f'{{"label": {json.dumps(o.label)}, "bbox_3d": {rounded_box(o.box)}}}' for o in objects]
    return "```json\n[\n\t" + ",\n\t".join(lines) + "\n]```"


def visible_objects(info: ScanInfo, frames: Sequence[Frame]) -> tuple[LabeledBox, ...]:
    """Objects that EmbodiedScan lists as visible in these frames, with boxes in the first frame's camera."""
    # A dict as an ordered set: an instance stays at its first occurrence.
    visible = dict.fromkeys(number for frame in frames for number in sorted(info.visible[frame.index]))
    instances = [info.instances[number] for number in visible if number in info.instances]  # the others are broken
    return tuple(
        LabeledBox(instance.label, world_to_camera(instance.box, frames[0].cam_to_world))
        for instance in instances
        if instance.label not in SKIPPED_LABELS
    )


def _windows(scene: Scene, options: TaskOptions) -> Iterator[list[Frame]]:
    """All windows of a scene, by first frame."""
    count, interval = options.frames.count, options.interval
    span = (count - 1) * interval + 1  # neighbouring frames from a window's first frame to its last
    run: list[Frame] = []  # the last `span` neighbouring frames
    for frame in scene.frames:
        # A missing frame (no valid pose, or not listed by EmbodiedScan) ends the run.
        run = [*run, frame][-span:] if run and frame.index == run[-1].index + options.step else [frame]
        if len(run) == span:
            yield run[::interval]


def _sample(scene: Scene, info: ScanInfo, frames: list[Frame]) -> Sample:
    """The sample of one window."""
    objects = visible_objects(info, frames)
    return Sample(
        id=f"{scene.scene_id}|{frames[0].index:05d}",
        task="detection",
        scene_id=scene.scene_id,
        **frame_fields(frames),
        question=QUESTION,
        answer=answer_text(objects),
        objects=objects,
    )


@register_task
class Detection(Task):
    """A few neighbouring frames -> the boxes of all visible objects."""

    name = "detection"
    cli_options = ("count", "interval", "step", "windows", "train_windows", "seed")

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        return InputFile("infos", infos_files(root, options.split)[0], EMBODIEDSCAN)

    def read(self, root: Path, options: TaskOptions) -> Sequence[Any]:
        return list(read_infos(self.annotations(root, options).path).values())

    def jobs(self, root: Path, options: TaskOptions) -> tuple[Job, ...]:
        infos = read_infos(self.annotations(root, options).path)
        jobs = [
            Job(scene_id, number, info=info, skipped_inputs=broken_instances(info))
            for number, (scene_id, info) in enumerate(infos.items())
        ]
        broken = enumerate(infos.broken.items(), start=len(jobs))
        return (*jobs, *(Job(scene_id, number, problem=message) for number, (scene_id, message) in broken))

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        """Samples of one scene, one per window, by first frame; a seeded subset if there are more than ``windows``."""
        assert job.info is not None, "the plan gives every scene its EmbodiedScan infos"
        windows = list(_windows(keep_listed_frames(scene, job.info), options))
        if not windows:
            location = f"EmbodiedScan's infos: scannet/{scene.scene_id}"
            return [(job.number, SkippedItem(scene.scene_id, NO_WINDOW, location))]
        if options.windows and len(windows) > options.windows:
            # Seeded by the scene, so that the draw does not depend on the other scenes or on the number of processes.
            digest = hashlib.sha256(f"{options.frames.seed} {scene.scene_id}".encode()).digest()
            drawn = np.random.default_rng(list(digest)).permutation(len(windows))[: options.windows]
            windows = [windows[i] for i in sorted(drawn.tolist())]
        return [(job.number, _sample(scene, job.info, window)) for window in windows]

    def parse(self, text: str, frame_count: int, box_format: BoxFormat = "camera") -> list[tuple[str, np.ndarray]]:
        return parse_objects(text)

    def change_world(self, sample: Sample, change: Similarity) -> Sample:
        # Boxes in a camera that moves along.
        objects = tuple(
            replace(each, box=np.concatenate([change.scale * each.box[:6], each.box[6:]])) for each in sample.objects
        )
        return replace(move_sample(sample, change), objects=objects, answer=answer_text(objects))

    def unit(self, options: TaskOptions) -> str:
        return "scenes"

    def items(self, job: Job, options: TaskOptions) -> list[tuple[int, str, str]]:
        return [(job.number, job.scene_id, f"EmbodiedScan's infos: scannet/{job.scene_id}")]

    def determines_visibility(self, options: TaskOptions) -> bool:
        return True  # EmbodiedScan lists the visible objects of every frame

    def is_unseen(self, item: PreparedItem) -> bool:
        return isinstance(item, Sample) and not item.objects

    def scene_parts(self, options: TaskOptions) -> SceneParts:
        return SceneParts.POSES  # the boxes are EmbodiedScan's

    def recorded_options(self, options: TaskOptions) -> dict[str, Any]:
        frames = {"count": options.frames.count, "seed": options.frames.seed}
        return {"frames": frames, "interval": options.interval, "step": options.step, "windows": options.windows}
