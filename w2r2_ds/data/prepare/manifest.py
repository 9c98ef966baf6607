"""Manifest of a prepared data set (options, input hashes, counts), and whether an existing data set can be reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.data.prepare.plan import Plan, recorded_options, scene_files
from w2r2_ds.data.prepare.unseen import Unseen, unseen_line
from w2r2_ds.data.prepared_set import MANIFEST, VERSION, read_manifest
from w2r2_ds.data.sources.frame_files import list_names
from w2r2_ds.utils.files.hashing import file_sha256, json_sha256
from w2r2_ds.utils.source_hash import source_sha256

MISSING = "missing"
"""Value in place of the hash of a missing file."""
UNREADABLE = "unreadable: "
"""Prefix of the error in place of the hash of a file that cannot be read."""
THREADS = 16
"""Threads that hash the files of scenes; the work is bound by the disk."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or ``MISSING``.

    Raises:
        ValueError: the file exists, but cannot be read.
    """
    try:
        return file_sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct its permissions or the disk.") from None


def frames_hash(folder: Path) -> str:
    """SHA-256 of the file names in a scene's folder of frames and of its poses and intrinsics, or ``MISSING``.

    The contents of colour and depth images (130 GB in all) are not read.

    Raises:
        ValueError: the folder or a text file exists, but cannot be read.
    """
    if not folder.is_dir():
        return MISSING
    names = sorted(list_names(folder))
    return json_sha256([{name: file_hash(folder / name) if name.endswith(".txt") else "" for name in names}])


def task_inputs(plan: Plan) -> dict[str, str]:
    """Hashes of the task's input files: path relative to the data root -> hash."""
    return {relative(path, plan.root): file_hash(path) for path in plan.files}


def scene_inputs(plan: Plan) -> dict[str, dict[str, str]]:
    """Hashes of every scene's input files: scene -> path relative to the data root -> hash.

    Covers alignment, boxes, intrinsics and poses, but of the images only their names. A file that cannot be read
    has ``UNREADABLE`` and the error.
    """

    def hash_or_error(function: Callable[[Path], str], path: Path) -> str:
        try:
            return function(path)
        except ValueError as error:  # reading the scene raises it again, and `skip_broken_scenes` may skip the scene
            return f"{UNREADABLE}{error}"

    def hashes(scene_id: str) -> dict[str, str]:
        paths = scene_files(plan.root, scene_id, plan.options)
        found = {relative(path, plan.root): hash_or_error(file_hash, path) for path in paths}
        folder = plan.root / "posed_images" / scene_id
        return {**found, relative(folder, plan.root): hash_or_error(frames_hash, folder)}

    with ThreadPoolExecutor(THREADS) as pool:
        scene_ids = [job.scene_id for job in plan.jobs]
        return dict(zip(scene_ids, pool.map(hashes, scene_ids), strict=True))


def relative(path: Path, root: Path) -> str:
    """The path relative to the root; unchanged if it is outside."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def manifest_identity(
    plan: Plan, inputs: Mapping[str, str], skip_broken_scenes: bool, skip_without_box: bool
) -> dict[str, Any]:
    """The part of a manifest that determines the data set.

    Equal identities give equal samples, unless the content of an image has changed (see `frames_hash`), or a module
    that the file of a plug-in's task imports.

    Args:
        plan: preparation plan.
        inputs: path -> hash of all input files.
        skip_broken_scenes: option of `pipeline.prepare`.
        skip_without_box: option of `pipeline.prepare`.
    """
    code = source_sha256(plan.task)
    skips = {"skip_broken_scenes": skip_broken_scenes, "skip_without_box": skip_without_box}
    return {
        "version": VERSION,
        "task": plan.options.task,
        **({} if code is None else {"code": code}),
        "format": plan.options.format,
        "split": plan.options.split,
        "options": {**recorded_options(plan.options), **skips},
        "inputs": dict(inputs),
    }


def make_counts(plan: Plan, samples: int, scenes: int, without_pose: int, unseen: Unseen) -> dict[str, Any]:
    """Counts for the manifest, with a comparison of the number of annotations with the published number.

    Args:
        plan: preparation plan.
        samples: number of samples.
        scenes: number of prepared scenes.
        without_pose: number of their frames without a valid pose.
        unseen: items that no frame shows.
    """
    found: dict[str, Any] = {"samples": samples, "scenes": scenes, "frames_without_pose": without_pose}
    # If the unit is scenes (detection), the number of prepared scenes stays; others are skipped items.
    found.setdefault(plan.unit, plan.items)
    if plan.task.determines_visibility(plan.options):
        found["unseen"] = asdict(unseen)
    if plan.published is not None:
        found["published"] = {
            "of": plan.unit,
            "count": plan.published,
            "annotated": plan.items,
            "met": plan.items == plan.published,
        }
    return found


def summary_line(folder: Path, manifest: Mapping[str, Any], reused: bool) -> str:
    """Lines about a prepared folder: samples, published count, unseen and skipped items, skipped inputs."""
    numbers = manifest["counts"]
    units = [
        name for name in numbers if name not in ("samples", "scenes", "frames_without_pose", "unseen", "published")
    ]
    sources = " in ".join(f"{numbers[name]} {name}" for name in [*units, "scenes"])
    lines = [f"{'reusing ' if reused else ''}{folder}: {numbers['samples']} samples of {sources}"]
    published = numbers.get("published")
    if published is not None:
        compared = "as published" if published["met"] else f"not the {published['count']} that are published"
        lines.append(f"  {published['annotated']} {published['of']}, {compared}")
    if line := unseen_line(numbers, manifest["options"].get("visibility", "")):
        lines.append(f"  {line}")
    if manifest["skipped"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items())
        lines.append(f"  skipped: {reasons} (see skipped.jsonl)")
    lines += [f"  skipped input: {line}" for line in manifest["skipped_inputs"]]
    return "\n".join(lines)


def check_reusable(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds the complete data set with this identity; False if the folder is not complete.

    Args:
        folder: prepared folder, which may not exist.
        identity: identity of the data set to prepare, see `manifest_identity`.

    Raises:
        ValueError: it holds another complete data set, or its files have changed or cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = read_manifest(folder)
    except ValueError as error:
        raise ValueError(f"{error} Remove {folder}, or pass another --out.") from None
    for name, value in identity["inputs"].items():
        if value.startswith(UNREADABLE) and found["inputs"].get(name) != value:
            raise ValueError(value.removeprefix(UNREADABLE))
    for name, value in identity.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds another prepared data set ({_difference(name, found.get(name), value)}); "
                "remove it, or pass another --out."
            )
    # The data set may be damaged or edited since it was prepared.
    changed = [name for name, digest in found["files"].items() if file_hash(folder / name) != digest]
    if changed:
        raise ValueError(f"{folder / changed[0]} is not the file that {MANIFEST} describes; remove {folder}.")
    return True


def _difference(name: str, found: Any, expected: Any) -> str:
    """Description of the first difference of a manifest's entry `name`, for a message."""
    if not isinstance(found, Mapping) or not isinstance(expected, Mapping):
        return f"{name} is {found!r} there and {expected!r} here"
    key = next(key for key in {**expected, **found} if found.get(key) != expected.get(key))
    if name == "inputs":
        return f"{key} has changed since the preparation"
    return f"{name}: {_difference(key, found.get(key), expected.get(key))}"
