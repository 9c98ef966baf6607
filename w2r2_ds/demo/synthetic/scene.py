"""Make one synthetic scene: write its files, and return its entries for the annotation files of its split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.visibility import clear_area
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.demo.synthetic.annotations import propose, scene_info
from w2r2_ds.demo.synthetic.contact_sheet import write_sheet
from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.options import Options, scene_seed
from w2r2_ds.demo.synthetic.phrases import phrases
from w2r2_ds.demo.synthetic.questions import GeneratedQuestion, make_questions
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject, make_room
from w2r2_ds.demo.synthetic.sentences import Sentence, make_sentences
from w2r2_ds.demo.synthetic.shift.cues import object_cue
from w2r2_ds.demo.synthetic.shift.variants import OTHER_SIZES, SAME_PIXELS, room_layout, shifted, unshifted
from w2r2_ds.demo.synthetic.view import View, render_view

_SENTENCES = (6, 10)
_QUESTIONS = (6, 10)
"""Minimum and maximum number per scene."""
_ATTEMPTS = 50
"""Rooms that are drawn until one has enough sentences."""
_QUESTION_STREAM, _PROPOSAL_STREAM, _SHIFT_STREAM = 1000, 1001, 1002
"""Last number of the seed for questions, proposals and shifts (for rooms: the attempt), so that their draws are
independent."""


@dataclass(frozen=True)
class SceneEntries:
    """Entries of one scene in the annotation files of its split.

    Attributes:
        scene_id: name as in ScanNet.
        descriptions: ScanRefer's entries.
        questions: ScanQA's entries.
        info: EmbodiedScan's entry.
        proposals: axis-aligned boxes ``[cx, cy, cz, dx, dy, dz]``, aligned world, metres.
        cues: entries of the file of cues, one per description; empty if the split is not shifted.
    """

    scene_id: str
    descriptions: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    info: dict[str, Any]
    proposals: list[list[float]]
    cues: list[dict[str, Any]]


def write_scene(root: Path, options: Options, split: str, index: int) -> dict[str, SceneEntries]:
    """Make a room, write its files to ``root`` and return its annotation entries by split.

    Rooms are drawn until one has enough unambiguous sentences; only that one is written. A validation room is written
    once for ``val`` and once for every shift, with the same sentences and questions.

    Raises:
        ValueError: there is no such room in `_ATTEMPTS` draws.
    """
    names = options.shift.names if split == "val" else ()
    for attempt in range(_ATTEMPTS):
        rng = _generator(options, split, index, attempt)  # seeded by the attempt, not by earlier draws
        room = make_room(rng, options.frames_per_scene, room_layout(options))
        # All images are rendered even if the room is dropped: sentences refer to visible objects only, and visibility
        # is measured in the depth images, as in real scans.
        base = render_view(root, options, split, index, unshifted(room, options))
        views = [base]
        for name in names:
            variant = shifted(name, room, options, _generator(options, split, index, _SHIFT_STREAM))
            same = base if name in SAME_PIXELS else None
            views.append(render_view(root, options, f"val_{name}", index, variant, same))
        visible = set.intersection(*(view.visible() for view in views))
        others = [view.room.objects for name, view in zip(names, views[1:], strict=True) if name in OTHER_SIZES]
        if options.sentences == "phrases":
            minimum, sentences = 1, phrases(rng, room.objects, visible)
        else:
            minimum, count = _SENTENCES[0], int(rng.integers(_SENTENCES[0], _SENTENCES[1] + 1))
            sentences = make_sentences(rng, room.objects, visible, count, others)
        if len(sentences) >= minimum:
            break
    else:
        raise ValueError(
            f"none of {_ATTEMPTS} rooms has {minimum} unambiguous sentences; use more frames per scene or objects"
        )
    # As in ScanNet, camera poses are stored in a raw world, which is not aligned with the walls.
    axis_align = _alignment(rng)
    question_rng = _generator(options, split, index, _QUESTION_STREAM)
    count = int(question_rng.integers(_QUESTIONS[0], _QUESTIONS[1] + 1))
    questions = make_questions(question_rng, room.objects, visible, count, others, options.questions)
    entries = {}
    for view in views:
        scaled = axis_align.copy()
        scaled[:3, 3] *= view.variant.scale  # the raw world is scaled too
        entries[view.split] = _write_view(root, options, view, sentences, questions, scaled, index)
    for name, view in zip(names, views[1:], strict=True):
        own = entries[view.split]
        cues = _cues(name, options, base, view, own.descriptions)
        entries[view.split] = replace(own, cues=cues)
    return entries


def _generator(options: Options, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([*scene_seed(options.seed, split, index), stream])


def _write_view(
    root: Path,
    options: Options,
    view: View,
    sentences: list[Sentence],
    questions: list[GeneratedQuestion],
    axis_align: np.ndarray,
    index: int,
) -> SceneEntries:
    """Write the files of a scene; returns its entries, without cues."""
    room, frames, intrinsic = view.room, view.frames, view.variant.intrinsic
    _write_images(view)
    poses = [np.linalg.inv(axis_align) @ frame.cam_to_world for frame in frames]
    _write_geometry(root, view.name, room, frames, poses, axis_align)
    sheet = root / "contact_sheets" / f"{view.name}.png"
    write_sheet(sheet, frames, view.colors, view.depths, intrinsic, room.objects, sentences)
    proposal_rng = _generator(options, view.split.partition("_")[0], index, _PROPOSAL_STREAM)
    return SceneEntries(
        view.name,
        _descriptions(view.name, sentences),
        _questions(view.name, view.split, room, questions),
        scene_info(view.name, room.objects, frames, poses, view.visible_ids, axis_align, intrinsic),
        propose(proposal_rng, room).tolist(),
        [],
    )


def _cues(
    shift: str, options: Options, base: View, view: View, descriptions: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Entries of the file of cues, one per description."""
    cues = []
    for entry in descriptions:
        object_id = int(entry["object_id"])
        key = f"{entry['object_id']}|{entry['object_name']}|{entry['ann_id']}"  # as `Description.key`
        o = view.room.objects[object_id]
        areas = {
            frame.index: clear_area(o.box, frame.cam_to_world, view.variant.intrinsic, view.image_size)
            for frame in view.frames_of(o)
        }
        cues.append(
            {"id": f"{view.name}|{key}", "paired_id": f"{base.name}|{key}", "shift": shift}
            | {"scene_id": view.name, "object_id": object_id}
            | object_cue(shift, options, base.variant, view.variant, object_id, areas)
        )
    return cues


def _write_images(view: View) -> None:
    folder = view.frames[0].color.parent
    folder.mkdir()
    for frame, color, depth in zip(view.frames, view.colors, view.depths, strict=True):
        Image.fromarray(color).save(frame.color, quality=92)
        Image.fromarray(depth).save(frame.depth, compress_level=1)
    for file in ("intrinsic.txt", "depth_intrinsic.txt"):
        (folder / file).write_text(_numbers(view.variant.intrinsic))


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
