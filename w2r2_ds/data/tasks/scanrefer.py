"""ScanRefer: a description of an object -> its 3D bounding box, in two formats.

Format ``vgllm``: the answer is the index of the clearest frame and the object's 9-number box *in that frame's camera*
(OpenCV axes; centre and size in metres, ZXY angles in radians). It is the axis-aligned world box (angles 0) transformed
into the camera, so its angles depend on the camera only. Quarter turns of the world box about the vertical are equal
boxes; option `box_angles` selects one of the four descriptions. As in VG-LLM (LaVi-Lab/VG-LLM
``process_scanrefer.py``), a training sample needs an EmbodiedScan instance that matches the annotated box, and a
selected frame that shows it. Validation keeps every description; the answer is empty if no selected frame shows the
object.

Format ``video3dllm``: the answer is the lowest and the highest corner of the world box (the "gen" template of
LaVi-Lab/Video-3D-LLM ``process_scanrefer.py``). The public code trains the other template, an ``<ground>`` token, so
the number format is this project's: two decimals, or one (option `decimals`), separated by commas.

The split ``test`` (ScanRefer's benchmark, on ScanNet's hidden scans) has neither boxes nor answers. Its samples have an
empty label and no target. The world of these scans is the raw one, as in ScanRefer's code: they have no alignment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from w2r2_ds.boxes3d.transforms import nearest_heading, world_to_camera
from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.frames.visibility import clearest_frame
from w2r2_ds.data.images import frame_size
from w2r2_ds.data.sources.annotations import Description
from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.tasks.base import (
    NO_INSTANCE_MATCH,
    NO_VISIBLE_FRAME,
    Job,
    PreparedItem,
    PreparedItems,
    SkippedItem,
    TaskOptions,
    register_task,
)
from w2r2_ds.data.tasks.common import (
    DescriptionTask,
    ObjectVisibility,
    find_visible_frames,
    frame_fields,
    frames_or_skip,
    is_hidden,
    move_sample,
    rounded,
    rounded_box,
    target_of,
    world_box,
)
from w2r2_ds.data.tasks.parsing import Grounding, WorldGrounding, parse_grounding, parse_world_box
from w2r2_ds.types.sample import BoxFormat, Kind, Sample

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

QUESTION = (
    "Localize the first clear frame in the video showing the object described in the text.\n"
    "Text: {description}\n"
    'Output a JSON dictionary with the frame index in "frame" and its 3D bounding box in "bbox_3d" '
    "in the frame's coordinates.\n"
)
WORLD_QUESTION = (
    "Localize the object according to the following description.\n"
    "{description}\n"
    "Output the answer in the format x_min,y_min,z_min,x_max,y_max,z_max"
)


def question_text(description: str, template: str = QUESTION) -> str:
    """The text of the prompt after the frames, equal to VG-LLM's or Video-3D-LLM's; both capitalise the description."""
    return template.format(description=description.capitalize())


def description_span(description: str, template: str = QUESTION) -> tuple[int, int]:
    """Characters ``[begin, end)`` of the question that are the description, without surrounding white space."""
    written = description.capitalize()
    # format() of the text before the field turns doubled braces into single ones, as in the question.
    begin = len(template.partition("{description}")[0].format()) + len(written) - len(written.lstrip())
    return begin, begin + len(written.strip())


def answer_text(frame: int, box: np.ndarray, decimals: int = 2) -> str:
    """VG-LLM's answer: JSON in a code block, with Python's ``repr`` of rounded numbers (``3.0``, ``0.59``).

    Args:
        frame: index among the sample's frames.
        box: ``[9]`` box in that frame's camera (centre, size, ZXY angles; metres, radians).
        decimals: digits to round to.
    """
    return f'```json\n\t{{"frame": {frame}, "bbox_3d": {rounded_box(box, decimals)}}}\n```'


def world_answer_text(box: np.ndarray, decimals: int = 2) -> str:
    """Video-3D-LLM's answer, ``x_min,y_min,z_min,x_max,y_max,z_max``.

    Args:
        box: axis-aligned box that begins with centre and size, metres. A side is at least one unit of the last digit,
            because a zero-size box is invalid.
        decimals: digits to round to.
    """
    low, high = (rounded(box[:3] + sign * box[3:6] / 2, decimals) for sign in (-1, 1))
    ends = [*low, *(max(top, round(bottom + 10**-decimals, decimals)) for bottom, top in zip(low, high, strict=True))]
    return ",".join(str(number) for number in ends)


def _camera_samples(
    scene: Scene,
    job: Job,
    description: Description,
    visible: ObjectVisibility,
    options: TaskOptions,
    size: tuple[int, int],
) -> Iterator[PreparedItem]:
    """Samples (one per roll) and skipped items of one description in format ``vgllm``."""
    training = options.split == "train"
    if training and visible.box is None:
        yield SkippedItem(description.key, NO_INSTANCE_MATCH, description.location)
        return
    rolls = options.rolls if training else 1
    for roll in range(rolls):
        key = f"{description.key}#{roll}" if rolls > 1 else description.key
        # In validation, the selection is independent of the object's visibility, which is part of the answer.
        chosen = select_frames(options.frames, scene, key, visible.frames if training else None)
        best = None
        if chosen is not None and visible.box is not None:
            candidates = [position for position in chosen if position in visible.frames]
            best = clearest_frame(scene.frames, candidates, visible.box, scene.intrinsic, size)
        if chosen is None or (training and best is None):
            yield SkippedItem(key, NO_VISIBLE_FRAME, description.location)
            continue
        answer = ""
        if best is not None:
            # The label is ScanRefer's box; EmbodiedScan's (visible.box) only selects the frame.
            box, pose = world_box(scene, description.object_id), scene.frames[best].cam_to_world
            if options.box_angles == "nearest_heading":
                box = nearest_heading(box, pose)
            answer = answer_text(chosen.index(best), world_to_camera(box, pose))
        yield _sample(scene, job, description, key, chosen, answer)


def _sample(scene: Scene, job: Job, description: Description, key: str, chosen: list[int], answer: str) -> Sample:
    return Sample(
        id=key,
        task="scanrefer",
        scene_id=description.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(description.text),
        answer=answer,
        target=target_of(scene, job, description, description.ann_id),
        what=description_span(description.text),
    )


def _world_sample(
    scene: Scene, job: Job, description: Description, options: TaskOptions, visibility: Mapping[int, ObjectVisibility]
) -> PreparedItem:
    chosen = frames_or_skip(scene, description, description.key, options, visibility)
    if isinstance(chosen, SkippedItem):
        return chosen
    return Sample(
        id=description.key,
        task="scanrefer",
        scene_id=description.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(description.text, WORLD_QUESTION),
        answer=world_answer_text(world_box(scene, description.object_id), options.decimals),
        target=target_of(scene, job, description, description.ann_id),
        what=description_span(description.text, WORLD_QUESTION),
    )


def _hidden_sample(scene: Scene, description: Description, options: TaskOptions) -> Sample:
    """A sample of the hidden test split."""
    chosen = select_frames(options.frames, scene, description.key, None)
    assert chosen is not None, "without visibility, frames are always found"
    template = QUESTION if options.format == "vgllm" else WORLD_QUESTION
    return Sample(
        id=description.key,
        task="scanrefer",
        scene_id=description.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(description.text, template),
        answer="",
        what=description_span(description.text, template),
    )


@register_task
class ScanRefer(DescriptionTask):
    """A sentence about an object -> the object's box."""

    name = "scanrefer"
    published: ClassVar = {"train": 36665, "val": 9508}
    cli_options = ("format", "frames", "rolls", "visibility", "box_angles", "decimals", "skip_without_box")

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        """Samples and skipped descriptions of one scene, in the order of the file.

        Raises:
            ValueError: the scene's frames are not those that EmbodiedScan lists, or an image cannot be read.
        """
        if is_hidden(options):
            return [(number, _hidden_sample(scene, description, options)) for number, description in job.items]
        scene, visibility = find_visible_frames(scene, job, options)
        if options.format == "video3dllm":
            return [(n, _world_sample(scene, job, description, options, visibility)) for n, description in job.items]
        size = frame_size(scene.frames[0].color)  # `load_scene` has compared the sizes of all images
        return [
            (number, item)
            for number, description in job.items
            for item in _camera_samples(scene, job, description, visibility[description.object_id], options, size)
        ]

    def kind(self, options: TaskOptions) -> Kind:
        return "grounding"

    def box_format(self, options: TaskOptions) -> BoxFormat:
        return "camera" if options.format == "vgllm" else "world"

    def parse(self, text: str, frame_count: int, box_format: BoxFormat = "camera") -> Grounding | WorldGrounding:
        if box_format == "world":
            return WorldGrounding(parse_world_box(text))
        return parse_grounding(text, frame_count)

    def change_world(self, sample: Sample, change: Similarity) -> Sample:
        moved = move_sample(sample, change)
        if not sample.answer:  # no frame shows the object
            return moved
        if sample.box_format == "world":
            assert sample.target is not None, "a label has a box"
            box = change.apply_aligned_box(sample.target.box[:6])
            return replace(moved, answer=world_answer_text(box, sample.decimals))
        # The numbers of the text, because its angles may be any of those that describe the same box.
        label = parse_grounding(sample.answer, len(sample.frames))
        return replace(
            moved, answer=answer_text(label.frame, np.concatenate([change.scale * label.box[:6], label.box[6:]]))
        )

    def unit(self, options: TaskOptions) -> str:
        return "descriptions"

    def uses_visibility(self, options: TaskOptions) -> bool:
        # Format vgllm: the answer is a frame that shows the object. scene_sets selects a set with such a frame.
        if is_hidden(options):
            return False
        return options.format == "vgllm" or (options.split == "train" and options.frames.protocol == "scene_sets")

    def scene_parts(self, options: TaskOptions) -> SceneParts:
        if is_hidden(options):  # an answer in a frame's camera needs the pose of the frame
            return SceneParts.POSES if options.format == "vgllm" else SceneParts.NONE
        # Format vgllm: the box is moved to a frame's camera, and its projected area selects the frame.
        camera = SceneParts.POSES | SceneParts.INTRINSICS if options.format == "vgllm" else SceneParts.NONE
        return SceneParts.BOXES | camera

    def recorded_options(self, options: TaskOptions) -> dict[str, Any]:
        if options.format == "vgllm":
            return {"rolls": options.rolls, "box_angles": options.box_angles}
        return {"decimals": options.decimals}

    def default_rolls(self, options: TaskOptions) -> int:
        # As in VG-LLM, which draws the frames of every sample. Other protocols would give equal samples.
        drawn = options.format == "vgllm" and options.frames.protocol == "vgllm" and options.split == "train"
        return 2 if drawn else 1
