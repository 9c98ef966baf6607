"""Write a synthetic data set in ScanNet's and ScanRefer's layout, whole or not at all, reproducibly."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from w2r2_ds.data.frames import best_frame
from w2r2_ds.data.labels import LABELS_FILE
from w2r2_ds.data.scannet import Frame
from w2r2_ds.data.synthetic.furniture import KINDS
from w2r2_ds.data.synthetic.render import Renderer, pinhole
from w2r2_ds.data.synthetic.rooms import Room, RoomObject, make_room
from w2r2_ds.data.synthetic.sentences import Sentence, describe
from w2r2_ds.data.synthetic.sheet import write_sheet

VERSION = 1
"""Raise it whenever the same options give other files."""

SPLITS = ("train", "val")
_VAL_START = 5000
_SENTENCES = (6, 10)
_ATTEMPTS = 50
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Options:
    """What the content of a data set depends on; ``image_size`` is width and height in pixels."""

    seed: int
    train_scenes: int
    val_scenes: int
    image_size: tuple[int, int]
    frames_per_scene: int

    def __post_init__(self) -> None:
        """Check ranges; ``ValueError`` names the option."""
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if not (1 <= self.train_scenes <= _VAL_START and 1 <= self.val_scenes <= _VAL_START):
            raise ValueError(f"train_scenes and val_scenes must each be between 1 and {_VAL_START}")
        if len(self.image_size) != 2 or min(self.image_size) < 32:
            raise ValueError(f"image_size is {self.image_size}; it must be a width and a height of at least 32 pixels")
        if self.frames_per_scene < 2:
            raise ValueError(f"frames_per_scene is {self.frames_per_scene}; it must be at least 2")


@dataclass(frozen=True)
class Written:
    """Result of ``write_dataset``: the folder, whether it was there before, its manifest."""

    root: Path
    reused: bool
    manifest: dict[str, Any]

    @property
    def message(self) -> str:
        """One line for the user."""
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in self.manifest["counts"].items())
        return f"{'reusing' if self.reused else 'wrote'} {self.root}: {counts}"


def scene_id(split: str, index: int) -> str:
    """ScanNet-like name; validation scenes count from 5000, so that no name is in both splits."""
    return f"scene{index + _VAL_START * SPLITS.index(split):04d}_00"


def scene_seed(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """Entropy of a scene's generator; the split is part of it, so no training scene has a validation scene's seed."""
    return (seed, SPLITS.index(split), index)


def write_dataset(
    root: Path | str,
    seed: int = 0,
    train_scenes: int = 48,
    val_scenes: int = 12,
    image_size: tuple[int, int] = (320, 240),
    frames_per_scene: int = 24,
    workers: int = 1,
) -> Written:
    """Write furnished rooms, or reuse the complete data set with the same options that is already there.

    Everything is written to a folder beside ``root`` that is renamed at the end, so ``root`` is complete if it exists.

    Args:
        root: folder to write; see ``data/scannet.py`` for the layout, plus ``contact_sheets/`` and ``manifest.json``.
        seed: the same seed and options give the same bytes.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms, never one of the training rooms.
        image_size: width and height of colour and depth images, pixels.
        frames_per_scene: posed images per room.
        workers: processes; does not change the result.

    Raises:
        ValueError: an option is out of range, or ``root`` holds something else.
    """
    root = Path(root)
    options = Options(seed, train_scenes, val_scenes, (image_size[0], image_size[1]), frames_per_scene)
    existing = _existing(root, options)
    if existing is not None:
        return Written(root, True, existing)
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = root.parent / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        manifest = _write_all(aside, options, workers)
        try:
            aside.rename(root)
        except OSError:  # another process may have been faster; its data set is as good if the options agree
            existing = _existing(root, options)
            if existing is None:
                raise
            return Written(root, True, existing)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Written(root, False, manifest)


def _existing(root: Path, options: Options) -> dict[str, Any] | None:
    """Manifest of the data set at ``root`` if it can be reused, ``None`` if nothing is there."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    path = root / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {"version": manifest["version"], **manifest["options"]}
        manifest["counts"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{root} exists but has no readable {_MANIFEST}; name another folder or remove it") from None
    wanted = _described(options)
    other = sorted(name for name in wanted if found.get(name) != wanted[name])
    if other:
        have = ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in other)
        raise ValueError(f"{root} holds a data set made with {have}; name another folder, remove it or use its options")
    for split, index in _scenes(options):
        if not (root / "posed_images" / scene_id(split, index)).is_dir():
            raise ValueError(f"{root} lacks {scene_id(split, index)}; remove the folder so that it is written again")
    return dict(manifest)


def _described(options: Options) -> dict[str, Any]:
    return {"version": VERSION, **json.loads(json.dumps(asdict(options)))}


def _scenes(options: Options) -> list[tuple[str, int]]:
    return [("train", i) for i in range(options.train_scenes)] + [("val", i) for i in range(options.val_scenes)]


def _write_all(root: Path, options: Options, workers: int) -> dict[str, Any]:
    for folder in ("posed_images", "scans", "scannet_data", "ScanRefer", "contact_sheets"):
        (root / folder).mkdir(parents=True)
    scenes = _scenes(options)
    if workers > 1:
        with ProcessPoolExecutor(min(workers, len(scenes)), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(write_scene, root, options, split, index) for split, index in scenes]
            results = [future.result() for future in futures]
    else:
        results = [write_scene(root, options, split, index) for split, index in scenes]
    counts = {"train_scenes": options.train_scenes, "val_scenes": options.val_scenes}
    for split in SPLITS:
        entries = [entry for (of, _), part in zip(scenes, results, strict=True) if of == split for entry in part]
        _write_json(root / "ScanRefer" / f"ScanRefer_filtered_{split}.json", entries)
        counts[f"{split}_descriptions"] = len(entries)
    counts["frames"] = len(scenes) * options.frames_per_scene
    _write_labels(root / LABELS_FILE)
    described = _described(options)
    manifest = {"version": described.pop("version"), "seed": options.seed, "options": described, "counts": counts}
    _write_json(root / _MANIFEST, manifest)
    return manifest


def write_scene(root: Path, options: Options, split: str, index: int) -> list[dict[str, Any]]:
    """Make one room, write its files below ``root`` and return its ScanRefer entries."""
    name = scene_id(split, index)
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([*scene_seed(options.seed, split, index), attempt])
        room = make_room(rng, options.frames_per_scene)
        renderer = Renderer(room, options.image_size)
        images = [renderer.render(camera) for camera in room.cameras]
        colors, depths = [image[0] for image in images], [image[1] for image in images]
        frames = _frames(root / "posed_images" / name, room)
        visible = _visible(room, frames, depths, options.image_size)
        wanted = int(rng.integers(_SENTENCES[0], _SENTENCES[1] + 1))
        sentences = describe(rng, room.objects, visible, wanted)
        if len(sentences) >= _SENTENCES[0]:
            break
    else:
        raise ValueError(f"no room of {_ATTEMPTS} had {_SENTENCES[0]} clear sentences; use more frames per scene")
    _write_images(frames, colors, depths, options.image_size)
    _write_geometry(root, name, room, frames, rng)
    sheet = root / "contact_sheets" / f"{name}.png"
    write_sheet(sheet, frames, colors, depths, pinhole(options.image_size), room.objects, sentences)
    return _entries(name, sentences)


def _frames(folder: Path, room: Room) -> list[Frame]:
    return [Frame(i, folder / f"{i:05d}.jpg", folder / f"{i:05d}.png", camera) for i, camera in enumerate(room.cameras)]


def _visible(room: Room, frames: list[Frame], depths: list[np.ndarray], size: tuple[int, int]) -> set[int]:
    matrix = pinhole(size)
    return {o.object_id for o in room.objects if best_frame(frames, o.box, matrix, size, matrix, depths) is not None}


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


def _write_geometry(root: Path, name: str, room: Room, frames: list[Frame], rng: np.random.Generator) -> None:
    """Write poses (raw world), alignment and boxes. The raw world is turned and shifted, as a real scan's is."""
    angle = float(rng.uniform(0.2, 1.3))
    align = np.eye(4)
    align[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    align[:3, 3] = rng.uniform(-3.0, 3.0, size=3)
    to_raw = np.linalg.inv(align)
    for frame in frames:
        frame.color.with_suffix(".txt").write_text(_numbers(to_raw @ frame.cam_to_world))
    (root / "scans" / name).mkdir()
    words = " ".join(f"{value:.12f}" for value in align.ravel())
    (root / "scans" / name / f"{name}.txt").write_text(f"axisAlignment = {words}\nsceneType = Synthetic room\n")
    rows = [_row(o) for o in room.objects]
    np.save(root / "scannet_data" / f"{name}_aligned_bbox.npy", np.array(rows, dtype=np.float64), allow_pickle=False)


def _row(o: RoomObject) -> list[float]:
    return [*(float(value) for value in o.box), float(KINDS[o.name].label[0]), float(o.object_id)]


def _entries(name: str, sentences: list[Sentence]) -> list[dict[str, Any]]:
    """ScanRefer entries; ``ann_id`` counts the sentences about one object."""
    used: dict[int, int] = {}
    entries = []
    for sentence in sentences:
        number = used.get(sentence.object_id, 0)
        used[sentence.object_id] = number + 1
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


def _write_labels(path: Path) -> None:
    """The columns of ScanNet's table that are read here, in their places there."""
    columns = ("id", "raw_category", "category", "count", "nyu40id", "eigen13id", "nyuClass", "nyu40class")
    rows = ["\t".join(columns)]
    for number, (name, kind) in enumerate(KINDS.items(), start=1):
        rows.append("\t".join(map(str, (number, name, name, 0, kind.label[0], 0, kind.label[1], kind.label[1]))))
    path.write_text("\n".join(rows) + "\n")


def _numbers(matrix: np.ndarray) -> str:
    return "".join(" ".join(f"{value:.12f}" for value in row) + "\n" for row in matrix)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
