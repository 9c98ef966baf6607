"""Preparation of one task and split: scenes in parallel, one Parquet file per scene, written as soon as it is prepared.

Resume: the schema metadata of a scene's file contain a record with a key (hash of the options and of the scene's
inputs) and the skipped items. A scene whose file has the expected key is not prepared again. A file is replaced
atomically, so it is complete or absent. ``manifest.json`` is written last; a folder without it is not complete.

Several processes: worker processes of one call prepare different scenes and write different files. A lock beside the
folder excludes other calls.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from w2r2_ds.data.prepare.manifest import (
    check_reusable,
    make_counts,
    manifest_identity,
    scene_inputs,
    task_inputs,
)
from w2r2_ds.data.prepare.plan import Plan, make_plan, recorded_options
from w2r2_ds.data.prepare.unseen import Unseen, check_unseen, count_unseen
from w2r2_ds.data.prepared_set import MANIFEST, read_manifest, write_samples
from w2r2_ds.data.sources.frames import LOST_POSE
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks.base import (
    BROKEN_BOX,
    BROKEN_SCENE,
    NO_BOX,
    TASKS,
    AnnotationMismatch,
    Job,
    PreparedItems,
    SkippedItem,
    Task,
    TaskOptions,
    check_objects,
    parts_to_read,
    split_by_objects,
)
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.file_lock import locked
from w2r2_ds.utils.files.hashing import file_sha256, json_sha256
from w2r2_ds.utils.files.output_folder import check_writable, make_folder
from w2r2_ds.utils.findings import Finding, by_kind
from w2r2_ds.utils.parallel import listed, run_all
from w2r2_ds.utils.progress import progress

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
METADATA = "w2r2_ds"
"""Key of a scene's record in the schema metadata of its file."""
EMPTY = ".empty"
"""Suffix of the file of a scene without samples, which only has a record.

Such files are deleted at the end, because ``datasets`` cannot read a Parquet file without rows.
"""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder and its manifest; ``reused`` if an earlier run had completed it."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool


class PreparedScene(NamedTuple):
    """Result of `prepare_scene`.

    Attributes:
        items: samples and skipped items.
        skipped_inputs: broken boxes and lost frames that were skipped.
    """

    items: PreparedItems
    skipped_inputs: tuple[Finding, ...]


@dataclass(frozen=True)
class SceneFailure:
    """Errors of one scene.

    Attributes:
        scene_id: ScanNet scene name.
        messages: one per error.
        is_annotation_error: the annotations do not fit the scene; False for errors in the scene's files.
    """

    scene_id: str
    messages: list[str]
    is_annotation_error: bool


def prepare(
    root: Path | str,
    options: TaskOptions,
    out: Path | str,
    workers: int = 1,
    skip_broken_scenes: bool = True,
    skip_without_box: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Prepare one task and split; continue an interrupted preparation, or reuse a complete folder.

    Args:
        root: data root in ScanNet's layout (``data/sources/scannet.py``).
        options: task options.
        out: folder to write; a complete one with the same options and inputs is reused.
        workers: number of processes; 1 uses this process.
        skip_broken_scenes: skip and list items of scenes with missing or malformed files. False: an error.
        skip_without_box: skip and list items about objects without a box, instead of an error.
        quiet: no progress bar.

    Raises:
        ValueError: an option or a file cannot be used, `out` holds another data set, or another process is
            preparing it, or no scene can be used. Errors of scenes and annotations are collected over all scenes;
            the message has the first ten.
    """
    out = Path(out)
    if not (out / MANIFEST).is_file():  # a complete set that is reused may be on a read-only disk
        check_writable(out)
    plan = make_plan(root, options)
    files, scenes = task_inputs(plan), scene_inputs(plan)
    scene_hashes = {name: digest for scene in scenes.values() for name, digest in scene.items()}
    identity = manifest_identity(plan, {**files, **scene_hashes}, skip_broken_scenes, skip_without_box)
    if not check_reusable(out, identity):
        # Unlike the manifest, a scene's key does not cover the files of other scenes or the skip options. When these
        # change, the scene stays valid.
        common = {**identity, "inputs": files, "options": recorded_options(options)}
        keys = {scene_id: json_sha256([common, inputs]) for scene_id, inputs in scenes.items()}
        with locked(out.with_name(out.name + ".lock"), f"{out} is being prepared", "pass another --out"):
            if not check_reusable(out, identity):  # another process may have finished it before this one got the lock
                _check_folder(out)
                failures = _prepare_scenes(plan, out, keys, skip_without_box, workers, quiet)
                broken = _scenes_to_skip(plan, failures, skip_broken_scenes)
                return Prepared(out, _finish(plan, out, identity, broken), reused=False)
    return Prepared(out, read_manifest(out), reused=True)


def _check_folder(out: Path) -> None:
    """Create the folder; raise ``ValueError`` if it holds files that ``launchers/prepare.py`` did not write."""
    make_folder(out)
    # Files of an interrupted preparation are expected: scenes, temporary files of `atomic_io`, and skipped.jsonl.
    others = [
        path
        for path in out.iterdir()
        if path.suffix not in (".parquet", ".partial", EMPTY) and path.name != SKIPPED_FILE
    ]
    others += [path for path in out.glob("*.parquet") if _is_readable(path) and _metadata(path) is None]
    if others:
        raise ValueError(f"{out} holds {others[0].name}, which launchers/prepare.py did not write; pass another --out.")


def _prepare_scenes(
    plan: Plan, out: Path, keys: Mapping[str, str], skip_without_box: bool, workers: int, quiet: bool
) -> list[SceneFailure]:
    """Prepare the unfinished scenes; return their failures."""
    todo = [job for job in plan.jobs if not _is_done(out, job.scene_id, keys[job.scene_id], skip_without_box)]
    if todo and len(todo) < len(plan.jobs):
        done = len(plan.jobs) - len(todo)
        logger.info("%s: %d of %d scenes are done already", out, done, len(plan.jobs))
    failures = []
    with progress(f"{plan.options.task} {plan.options.split}: scenes", len(todo), quiet) as advance:
        arguments = [(plan.root, plan.options, job, out, keys[job.scene_id], skip_without_box) for job in todo]
        for failure in run_all(_write_scene, arguments, task_workers(plan.task, workers)):
            failures += [failure] if failure else []
            advance()
    return failures


def task_workers(task: Task, workers: int) -> int:
    """Number of processes for the scenes of a task.

    A task from outside the package uses this process: a worker may lack the module of its classes.
    """
    return workers if type(task).__module__.startswith("w2r2_ds.") else 1


def _is_done(out: Path, scene_id: str, key: str, skip_without_box: bool) -> bool:
    """Whether the scene's file is complete and was written for these options and inputs."""
    record = _scene_record(out, scene_id)
    if record is None or record["key"] != key:
        return False
    # The key does not cover --skip_without_box: a file written with it is valid without it if nothing was skipped.
    return skip_without_box or all(item["reason"] != NO_BOX for item in record["skipped"])


def _write_scene(
    root: Path, options: TaskOptions, job: Job, out: Path, key: str, skip_without_box: bool
) -> SceneFailure | None:
    """Write one scene's file (in a worker process). Errors are returned, so that those of all scenes are reported."""
    prepared = attempt_scene(root, options, job, skip_without_box)
    if isinstance(prepared, SceneFailure):
        return prepared
    samples = [(number, item) for number, item in prepared.items if isinstance(item, Sample)]
    skipped = [{"number": number, **asdict(item)} for number, item in prepared.items if isinstance(item, SkippedItem)]
    record = {
        "key": key,
        "skipped": skipped,
        "unseen": asdict(count_unseen(prepared.items, options)),
        "skipped_inputs": [asdict(finding) for finding in prepared.skipped_inputs],
    }
    scene, empty = (out / f"{job.scene_id}{suffix}" for suffix in (".parquet", EMPTY))
    written, other = (scene, empty) if samples else (empty, scene)
    write_samples(written, samples, root, {METADATA: json.dumps(record)})
    other.unlink(missing_ok=True)  # of an earlier preparation, with another key
    return None


def attempt_scene(
    root: Path, options: TaskOptions, job: Job, skip_without_box: bool = False
) -> PreparedScene | SceneFailure:
    """Call `prepare_scene`; its errors are returned."""
    try:
        return prepare_scene(root, options, job, skip_without_box=skip_without_box)
    except AnnotationMismatch as error:
        return SceneFailure(job.scene_id, error.messages, is_annotation_error=True)
    except ValueError as error:
        return SceneFailure(job.scene_id, str(error).splitlines(), is_annotation_error=False)


def _scene_record(out: Path, scene_id: str) -> dict[str, Any] | None:
    """Record of a prepared scene (key, skipped items, frames without pose); None if it is not prepared."""
    return _metadata(out / f"{scene_id}.parquet") or _metadata(out / f"{scene_id}{EMPTY}")


def _metadata(path: Path) -> dict[str, Any] | None:
    """The record that `_write_scene` stored in a file; None if there is no such complete file."""
    if not _is_readable(path):
        return None
    stored = (pq.read_schema(path).metadata or {}).get(METADATA.encode())
    return None if stored is None else dict(json.loads(stored))


def _is_readable(path: Path) -> bool:
    """Whether a file exists and is a complete Parquet file; its footer is read, which is written last."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):  # missing, or truncated, e.g. by a full disk
        return False
    return True


def prepare_scene(root: Path, options: TaskOptions, job: Job, skip_without_box: bool = False) -> PreparedScene:
    """Prepare one scene.

    Raises:
        AnnotationMismatch: annotations refer to objects that the scene lacks, and `skip_without_box` is False.
        ValueError: a file of the scene is missing or malformed.
    """
    task = TASKS.find(options.task)
    if job.problem:
        raise ValueError(job.problem)
    scene = load_scene(root, job.scene_id, parts_to_read(options))
    skipped_inputs = (*scene.skipped_inputs, *job.skipped_inputs)
    job, with_broken_box = split_by_objects(job, lambda object_id: object_id not in scene.broken_boxes)
    prepared: PreparedItems = [
        (
            number,
            SkippedItem(item_id, BROKEN_BOX, location, f"the box of its object in {scene.scene_id}_aligned_bbox.npy"),
        )
        for number, item_id, location in task.items(with_broken_box, options)
        if with_broken_box.items
    ]
    if skip_without_box:
        job, without_box = split_by_objects(job, lambda object_id: object_id in scene.instances)
        detail = f"its object has no box in {scene.scene_id}_aligned_bbox.npy"
        items = task.items(without_box, options)
        prepared += [(number, SkippedItem(item_id, NO_BOX, location, detail)) for number, item_id, location in items]
    check_objects(scene, job)
    if not prepared or job.items:  # else all items were skipped, and the task would prepare an empty job
        fields: dict[str, Any] = {"kind": task.kind(options), "box_format": task.box_format(options)}
        fields["decimals"] = options.decimals
        prepared += [
            (number, replace(item, **fields) if isinstance(item, Sample) else item)
            for number, item in task.make_samples(scene, job, options)
        ]
    return PreparedScene(prepared, skipped_inputs)


def _scenes_to_skip(plan: Plan, failures: Sequence[SceneFailure], skip: bool) -> list[SceneFailure]:
    """The scenes to skip. Raises ``ValueError`` with all other failures, in the order of the annotations."""
    order = {job.scene_id: job.number for job in plan.jobs}
    failures = sorted(failures, key=lambda failure: order[failure.scene_id])
    wrong = [message for failure in failures if failure.is_annotation_error for message in failure.messages]
    if wrong:
        head = f"{len(wrong)} annotations refer to objects that the scenes do not have (--skip_without_box skips them)"
        raise ValueError(listed(head, wrong))
    if failures and (not skip or len(failures) == len(plan.jobs)):
        head = f"{len(failures)} of {len(plan.jobs)} scenes cannot be used"
        if len(failures) < len(plan.jobs):
            head += " (--skip_broken_scenes true skips them)"
        raise ValueError(listed(head, [message for failure in failures for message in failure.messages]))
    return list(failures)


def _finish(plan: Plan, out: Path, identity: Mapping[str, Any], broken: Sequence[SceneFailure]) -> dict[str, Any]:
    """Write skipped.jsonl and the manifest; delete files of scenes that are not part of the data set.

    Args:
        plan: preparation plan.
        out: folder with the files of all scenes except `broken`.
        identity: identity of the data set, see `manifest_identity`.
        broken: scenes to skip.
    """
    records, skipped = _collect_records(plan, out, broken)
    unseen = sum((Unseen(**record["unseen"]) for record in records.values()), Unseen())
    try:
        check_unseen(unseen, plan.options, str(plan.task.annotations(plan.root, plan.options).path))
    except ValueError:
        # The keys of the files do not cover the content of depth images, so the scenes must be prepared again.
        for path in [*out.glob("*.parquet"), *out.glob(f"*{EMPTY}")]:
            path.unlink()
        raise
    files = [path for scene_id in records if (path := out / f"{scene_id}.parquet").is_file()]
    samples = sum(pq.read_metadata(path).num_rows for path in files)
    reasons = Counter(item["reason"] for item in skipped)
    check_samples(plan, samples, reasons)
    # Files of earlier annotations, and of scenes without samples.
    for path in {*out.glob("*.parquet"), *out.glob(f"*{EMPTY}")} - set(files):
        path.unlink()
    lines = [json.dumps({name: value for name, value in item.items() if name != "number"}) + "\n" for item in skipped]
    atomic_io.replace(out / SKIPPED_FILE, "".join(lines))
    findings = [Finding(**each) for record in records.values() for each in record["skipped_inputs"]]
    without_pose = sum(finding.count for finding in findings if finding.kind == LOST_POSE)
    manifest = {
        **identity,
        "counts": make_counts(plan, samples, len(records), without_pose, unseen),
        "skipped": dict(sorted(reasons.items())),
        "skipped_inputs": by_kind(findings),
        "files": {path.name: file_sha256(path) for path in [*files, out / SKIPPED_FILE]},
    }
    atomic_io.replace(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")  # last: it marks the folder as complete
    return manifest


def check_samples(plan: Plan, samples: int, reasons: Mapping[str, int]) -> None:
    """Raise ``ValueError`` with the reasons of the skipped items and their counts if there are no samples."""
    if not samples:
        skips = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        found = f"skipped: {skips}" if skips else "it has no item for these options"
        raise ValueError(
            f"No samples could be made from {plan.task.annotations(plan.root, plan.options).path} ({found}); "
            "docs/reference/data-formats.md explains the reasons."
        )


def _collect_records(
    plan: Plan, out: Path, broken: Sequence[SceneFailure]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Records of the prepared scenes, and all skipped items in the order of the annotations."""
    errors = {failure.scene_id: " ".join(failure.messages) for failure in broken}
    records: dict[str, dict[str, Any]] = {}
    skipped: list[dict[str, Any]] = []
    for job in plan.jobs:
        if job.scene_id in errors:
            skipped += [
                {"number": number, **asdict(SkippedItem(item_id, BROKEN_SCENE, location, errors[job.scene_id]))}
                for number, item_id, location in plan.task.items(job, plan.options)
            ]
        else:
            record = _scene_record(out, job.scene_id)
            assert record is not None, "every scene that is not broken has a file"
            records[job.scene_id] = record
            skipped += record["skipped"]
    return records, sorted(skipped, key=lambda item: item["number"])
