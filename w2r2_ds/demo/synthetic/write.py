"""Write a synthetic data set in the layout of ScanNet with its annotations, atomically and reproducibly."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from w2r2_ds.data.sources.labels import LABELS_FILE
from w2r2_ds.data.sources.shortcut_cues import cues_file, write_cues
from w2r2_ds.demo.synthetic.annotations import write_infos
from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.options import QUESTION_KINDS, Options, ShiftOptions, defaults, scene_id
from w2r2_ds.demo.synthetic.scene import SceneEntries, write_scene
from w2r2_ds.utils.files.atomic_io import add_filename
from w2r2_ds.utils.files.output_folder import PARTIAL, check_writable, fill, is_empty
from w2r2_ds.utils.interrupts import defer_interrupts

VERSION = 3
"""Version of the content; increase it if the same options give other files (`tests/demo/synthetic/shift` checks it)."""
_MANIFEST = "manifest.json"
_ANNOTATIONS = ("ScanRefer", "ScanQA", "embodiedscan", "proposals")


@dataclass(frozen=True)
class Written:
    """Result of ``write_dataset``: the folder, whether it existed already, and its manifest."""

    root: Path
    reused: bool
    manifest: dict[str, Any]

    @property
    def message(self) -> str:
        """One line about the data set."""
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in self.manifest["counts"].items())
        return f"{'reusing' if self.reused else 'wrote'} {self.root}: {counts}"


def write_dataset(
    root: Path | str,
    seed: int = 0,
    train_scenes: int = 48,
    val_scenes: int = 12,
    image_size: tuple[int, int] = (320, 240),
    frames_per_scene: int = 24,
    workers: int = 1,
    objects: float = 1.0,
    shift: ShiftOptions = ShiftOptions(),  # noqa: B008
    sentences: Literal["relations", "phrases"] = "relations",
    world_frame: Literal["center", "corner"] = "center",
    questions: Sequence[str] = QUESTION_KINDS,
) -> Written:
    """Write random rooms, or reuse an existing data set with the same options.

    Files are written to a temporary folder beside ``root``, which is renamed at the end. So ``root`` is complete if it
    exists.

    Args:
        root: folder to write. It has the layout of ``data/sources/scannet.py``, files of ScanQA, EmbodiedScan and
            proposals, ``contact_sheets/`` and ``manifest.json``.
        seed: the same seed and options give the same bytes.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms, different from the training rooms.
        image_size: width and height of colour and depth images in pixels.
        frames_per_scene: number of posed images per room.
        workers: number of processes; does not change the result.
        objects: factor on the number of objects of every class.
        shift: shifted validation splits and their strengths.
        sentences: kind of referring expressions, see `Options`.
        world_frame: origin and direction of the world, see `Options`.
        questions: kinds of questions, see `Options`.

    Raises:
        ValueError: an option is out of range, or ``root`` has other content.
    """
    root = Path(root)
    size = (image_size[0], image_size[1])
    scenes = (seed, train_scenes, val_scenes, size, frames_per_scene, objects)
    options = Options(*scenes, shift, sentences, world_frame, tuple(questions))
    existing = _existing(root, options)
    if existing is not None:
        return Written(root, True, existing)
    check_writable(root, option="the data set's folder")
    # An empty folder may be a mount point or the target of a link, which a renamed folder cannot replace: then the
    # temporary folder is inside, and its entries are moved up.
    target = Path(os.path.realpath(root))
    parent = target if target.is_dir() else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent, root.name)
    partial = parent / partial_name(root.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifest = _write_all(partial, options, workers)
        try:
            fill(target, partial)
        except OSError:
            # Another process may have renamed its folder first. Its data set is the same if the options agree.
            existing = _existing(root, options)
            if existing is None:
                raise
            return Written(root, True, existing)
    except OSError as error:
        add_filename(error, root)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Written(root, False, manifest)


def _existing(root: Path, options: Options) -> dict[str, Any] | None:
    """Manifest of an existing data set with these options; ``None`` if there is no data set."""
    if not root.exists() or is_empty(root, ignored=rf"\.{re.escape(root.name)}{PARTIAL}-.+"):
        return None
    path = root / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {"version": manifest["version"], **_json(defaults()), **manifest["options"]}
        manifest["counts"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{root} exists but has no readable {_MANIFEST}; use another folder or remove it") from None
    expected = _identity(options)
    different = sorted(name for name in expected if found.get(name) != expected[name])
    if different:
        values = ", ".join(f"{name} {found.get(name)} instead of {expected[name]}" for name in different)
        raise ValueError(f"{root} has a data set made with {values}; use another folder, remove it or use its options")
    for split in options.splits:
        for index in range(_scene_count(options, split)):
            name = scene_id(split, index)
            if not (root / "posed_images" / name).is_dir():
                raise ValueError(f"{root} lacks {name}; remove the folder so that it is written again")
    return dict(manifest)


def _identity(options: Options) -> dict[str, Any]:
    """Version and options as JSON values (tuples become lists); they determine the content of a data set."""
    return {"version": VERSION, **_json(asdict(options))}


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they are read from a JSON file."""
    return dict(json.loads(json.dumps(values, default=asdict)))


def _scene_count(options: Options, split: str) -> int:
    return options.train_scenes if split == "train" else options.val_scenes


def _write_all(root: Path, options: Options, workers: int) -> dict[str, Any]:
    """Write all files of a data set to a new folder; returns the manifest."""
    cues = ("shortcut_cues",) if options.shift.names else ()
    for folder in ("posed_images", "scans", "scannet_data", "contact_sheets", *_ANNOTATIONS, *cues):
        (root / folder).mkdir(parents=True)
    # One call per room; that of a validation room also writes its shifted versions.
    scenes = [(split, index) for split in ("train", "val") for index in range(_scene_count(options, split))]
    if workers > 1:
        # Every scene has its own seed, so the result does not depend on the number of workers. Results are collected in
        # the order of the scenes.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(scenes)), context) as pool:
            try:
                with defer_interrupts():
                    futures = [pool.submit(write_scene, root, options, split, index) for split, index in scenes]
                results = [future.result() for future in futures]
            finally:  # after an error or Ctrl-C, do not start the calls that are still queued
                pool.shutdown(wait=True, cancel_futures=True)
    else:
        results = [write_scene(root, options, split, index) for split, index in scenes]
    counts = {f"{split}_scenes": _scene_count(options, split) for split in options.splits}
    for split in options.splits:
        parts = [entries[split] for entries in results if split in entries]
        counts |= {f"{split}_{name}": number for name, number in _write_annotations(root, split, parts).items()}
        if split.startswith("val_"):
            write_cues(cues_file(root, split), [cue for part in parts for cue in part.cues])
    counts["frames"] = sum(_scene_count(options, split) for split in options.splits) * options.frames_per_scene
    _write_labels(root / LABELS_FILE)
    identity = _identity(options)
    manifest = {"version": identity.pop("version"), "seed": options.seed, "options": identity, "counts": counts}
    _write_json(root / _MANIFEST, manifest)
    return manifest


def _write_annotations(root: Path, split: str, parts: Sequence[SceneEntries]) -> dict[str, int]:
    """Write the annotation files of a split; returns the number of entries of each kind."""
    descriptions = [entry for part in parts for entry in part.descriptions]
    questions = [entry for part in parts for entry in part.questions]
    proposals = {f"scannet/{part.scene_id}": part.proposals for part in parts}
    _write_json(root / "ScanRefer" / f"ScanRefer_filtered_{split}.json", descriptions)
    _write_json(root / "ScanQA" / f"ScanQA_v1.0_{split}.json", questions)
    _write_json(root / "proposals" / f"scannet_{split}_pred_box.json", proposals, indent=None)
    write_infos(root / "embodiedscan" / f"embodiedscan_infos_{split}.pkl", [part.info for part in parts])
    return {
        "descriptions": len(descriptions),
        "questions": len(questions),
        "objects": sum(len(part.info["instances"]) for part in parts),
        "proposals": sum(len(part.proposals) for part in parts),
    }


def _write_labels(path: Path) -> None:
    """Write the label table of the classes, with those columns of ScanNet's that are used here."""
    columns = ("id", "raw_category", "category", "count", "nyu40id", "eigen13id", "nyuClass", "nyu40class")
    rows = ["\t".join(columns)]
    for number, (name, kind) in enumerate(KINDS.items(), start=1):
        rows.append("\t".join(map(str, (number, name, name, 0, kind.label[0], 0, kind.label[1], kind.label[1]))))
    path.write_text("\n".join(rows) + "\n")


def _write_json(path: Path, content: object, indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def partial_name(name: str) -> str:
    """Name of this process's temporary folder for a data set's folder: hidden, with host name and process id."""
    return f".{name}{PARTIAL}-{socket.gethostname()}-{os.getpid()}"


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove temporary folders of the data set ``name`` in ``parent`` whose processes have ended.

    Folders of other machines stay, because their processes cannot be checked. Folders without a host name are treated
    as those of this machine.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.partial-(?:(?P<host>.+)-)?(?P<pid>\d+)")
    for folder in parent.iterdir():
        match = pattern.fullmatch(folder.name)
        if match and match["host"] in (None, socket.gethostname()) and not _is_running(int(match["pid"])):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too


def _is_running(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # the process of another user
        return True
    return True
