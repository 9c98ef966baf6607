"""Make one synthetic scene: write its files, and return its entries for the annotation files of its split."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.projection import MIN_VISIBLE_FRACTION, projected_area, visible_fraction
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.demo.synthetic.annotations import propose, scene_info
from w2r2_ds.demo.synthetic.contact_sheet import write_sheet
from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.options import Options, scene_id, scene_seed
from w2r2_ds.demo.synthetic.questions import GeneratedQuestion, make_questions
from w2r2_ds.demo.synthetic.render import Renderer, pinhole
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject, make_room
from w2r2_ds.demo.synthetic.sentences import Sentence, make_sentences

_SENTENCES = (6, 10)
_QUESTIONS = (6, 10)
"""Minimum and maximum number per scene."""
_ATTEMPTS = 50
"""Rooms that are drawn until one has enough sentences."""
_QUESTION_STREAM, _PROPOSAL_STREAM = 1000, 1001
"""Last number of the seed for questions and proposals (for rooms: the attempt), so that their draws are independent."""


@dataclass(frozen=True)
class SceneEntries:
    """Entries of one scene in the annotation files of its split.

    Attributes:
        scene_id: name as in ScanNet.
        descriptions: ScanRefer's entries.
        questions: ScanQA's entries.
        info: EmbodiedScan's entry.
        proposals: axis-aligned boxes ``[cx, cy, cz, dx, dy, dz]``, aligned world, metres.
    """

    scene_id: str
    descriptions: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    info: dict[str, Any]
    proposals: list[list[float]]


def write_scene(root: Path, options: Options, split: str, index: int) -> SceneEntries:
    """Make a room, write its files to ``root`` and return its annotation entries.

    Rooms are drawn until one has enough unambiguous sentences; only that one is written.

    Raises:
        ValueError: there is no such room in `_ATTEMPTS` draws.
    """
    name = scene_id(split, index)
    intrinsic = pinhole(options.image_size)
    for attempt in range(_ATTEMPTS):
        rng = _generator(options, split, index, attempt)  # seeded by the attempt, not by earlier draws
        room = make_room(rng, options.frames_per_scene)
        renderer = Renderer(room, options.image_size)
        # All images are rendered even if the room is dropped: sentences refer to visible objects only, and visibility
        # is measured in the depth images, as in real scans.
        images = [renderer.render(camera) for camera in room.cameras]
        colors, depths = [image[0] for image in images], [image[1] for image in images]
        frames = _frames(root / "posed_images" / name, room)
        visible_ids = _visible_per_frame(room, frames, depths, intrinsic)
        visible = _visible_in_any(room, frames, visible_ids, intrinsic, options.image_size)
        count = int(rng.integers(_SENTENCES[0], _SENTENCES[1] + 1))
        sentences = make_sentences(rng, room.objects, visible, count)
        if len(sentences) >= _SENTENCES[0]:
            break
    else:
        raise ValueError(
            f"none of {_ATTEMPTS} rooms has {_SENTENCES[0]} unambiguous sentences; use more frames per scene"
        )
    _write_images(frames, colors, depths, options.image_size)
    # As in ScanNet, camera poses are stored in a raw world, which is not aligned with the walls.
    axis_align = _alignment(rng)
    poses = [np.linalg.inv(axis_align) @ frame.cam_to_world for frame in frames]
    _write_geometry(root, name, room, frames, poses, axis_align)
    sheet = root / "contact_sheets" / f"{name}.png"
    write_sheet(sheet, frames, colors, depths, intrinsic, room.objects, sentences)
    question_rng = _generator(options, split, index, _QUESTION_STREAM)
    count = int(question_rng.integers(_QUESTIONS[0], _QUESTIONS[1] + 1))
    questions = make_questions(question_rng, room.objects, visible, count)
    return SceneEntries(
        name,
        _descriptions(name, sentences),
        _questions(name, split, room, questions),
        scene_info(name, room.objects, frames, poses, visible_ids, axis_align, intrinsic),
        propose(_generator(options, split, index, _PROPOSAL_STREAM), room).tolist(),
    )


def _generator(options: Options, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([*scene_seed(options.seed, split, index), stream])


def _frames(folder: Path, room: Room) -> list[Frame]:
    return [Frame(i, folder / f"{i:05d}.jpg", folder / f"{i:05d}.png", camera) for i, camera in enumerate(room.cameras)]


def _visible_per_frame(
    room: Room, frames: list[Frame], depths: list[np.ndarray], intrinsic: np.ndarray
) -> list[list[int]]:
    """Ids of the visible objects of each frame."""
    return [
        [
            o.object_id
            for o in room.objects
            if visible_fraction(o.box, frame.cam_to_world, intrinsic, depth) >= MIN_VISIBLE_FRACTION
        ]
        for frame, depth in zip(frames, depths, strict=True)
    ]


def _visible_in_any(
    room: Room, frames: list[Frame], visible_ids: list[list[int]], intrinsic: np.ndarray, size: tuple[int, int]
) -> set[int]:
    """Ids of the objects that are visible in any frame into whose image their box projects."""
    return {
        o.object_id
        for o in room.objects
        if any(
            o.object_id in ids and projected_area(o.box, frame.cam_to_world, intrinsic, size) > 0
            for frame, ids in zip(frames, visible_ids, strict=True)
        )
    }


def _write_images(
    frames: list[Frame], colors: list[np.ndarray], depths: list[np.ndarray], size: tuple[int, int]
) -> None:
    folder = frames[0].color.parent
    folder.mkdir()
    for frame, color, depth in zip(frames, colors, depths, strict=True):
        Image.fromarray(color).save(frame.color, quality=92)
        Image.fromarray(depth).save(frame.depth, compress_level=1)
    for file in ("intrinsic.txt", "depth_intrinsic.txt"):
        (folder / file).write_text(_numbers(pinhole(size)))


def _alignment(rng: np.random.Generator) -> np.ndarray:
    """Random transform ``[4, 4]`` float64 from the raw world to the aligned world, like that of a real scan."""
    angle = float(rng.uniform(0.2, 1.3))
    align = np.eye(4)
    align[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    align[:3, 3] = rng.uniform(-3.0, 3.0, size=3)
    return align


def _write_geometry(
    root: Path, name: str, room: Room, frames: list[Frame], poses: list[np.ndarray], axis_align: np.ndarray
) -> None:
    """Write camera poses (raw world), axis alignment and boxes."""
    for frame, pose in zip(frames, poses, strict=True):
        frame.color.with_suffix(".txt").write_text(_numbers(pose))
    (root / "scans" / name).mkdir()
    words = " ".join(f"{value:.12f}" for value in axis_align.ravel())
    (root / "scans" / name / f"{name}.txt").write_text(f"axisAlignment = {words}\nsceneType = Synthetic room\n")
    rows = [_row(o) for o in room.objects]
    np.save(root / "scannet_data" / f"{name}_aligned_bbox.npy", np.array(rows, dtype=np.float64), allow_pickle=False)


def _row(o: RoomObject) -> list[float]:
    """Row of the file of boxes: centre, size, NYU40 id, object id."""
    return [*(float(value) for value in o.box), float(KINDS[o.name].label[0]), float(o.object_id)]


def _descriptions(name: str, sentences: list[Sentence]) -> list[dict[str, Any]]:
    """ScanRefer's entries; ``ann_id`` numbers the sentences about one object."""
    counts: Counter[int] = Counter()
    entries = []
    for sentence in sentences:
        number = counts[sentence.object_id]
        counts[sentence.object_id] += 1
        entries.append(
            {
                "scene_id": name,
                "object_id": str(sentence.object_id),
                "object_name": sentence.name.replace(" ", "_"),
                "ann_id": str(number),
                "description": sentence.text,
                "token": re.findall(r"\w+|[^\w\s]", sentence.text),
            }
        )
    return entries


def _questions(name: str, split: str, room: Room, questions: list[GeneratedQuestion]) -> list[dict[str, Any]]:
    """ScanQA's entries; ids have the name of the place (a scene without its scan number) and a number."""
    place = name.split("_")[0]
    return [
        {
            "scene_id": name,
            "question_id": f"{split}-{place}-{number}",
            "question": question.text,
            "answers": list(question.answers),
            "object_ids": list(question.object_ids),
            "object_names": [room.objects[i].name.replace(" ", "_") for i in question.object_ids],
        }
        for number, question in enumerate(questions)
    ]


def _numbers(matrix: np.ndarray) -> str:
    """Text of a matrix, one row per line."""
    return "".join(" ".join(f"{value:.12f}" for value in row) + "\n" for row in matrix)
