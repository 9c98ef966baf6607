"""Prepare one task and split: scenes in parallel, one Parquet file each, written as the scene is done.

A scene's file holds, in its schema's metadata, the key of its options and inputs and the items that were dropped. A
killed preparation therefore goes on: scenes whose file has the right key are skipped. ``manifest.json`` is written
last; without it the folder is not a data set yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from w2r2_ds.data.dataset import MANIFEST, read_manifest, write_samples
from w2r2_ds.data.prepare.manifest import counts, description, key_of, reusable, scene_inputs, task_inputs
from w2r2_ds.data.prepare.plan import Plan, make_plan, recorded_options
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks.base import (
    BROKEN_SCENE,
    NO_BOX,
    Dropped,
    Job,
    Outcomes,
    TaskOptions,
    WrongAnnotations,
    check_objects,
    find_task,
    split_by_boxes,
)
from w2r2_ds.data.validate import check_frames
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.file_lock import locked
from w2r2_ds.utils.hashing import file_sha256
from w2r2_ds.utils.parallel import listed, run_all
from w2r2_ds.utils.progress import progress

DROPPED = "dropped.jsonl"
METADATA, EMPTY = "w2r2_ds", ".empty"
"""Key of a scene's record in its file's schema metadata; suffix of scenes without samples, removed at the end:
``datasets`` cannot read a Parquet file without rows."""


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, its manifest, and whether it was there already."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool


@dataclass(frozen=True)
class _Failure:
    """What is wrong with a scene, or with the annotations of it."""

    scene_id: str
    sentences: list[str]
    annotations: bool


def prepare(
    root: Path | str,
    options: TaskOptions,
    out: Path | str,
    workers: int = 1,
    skip_broken_scenes: bool = False,
    skip_without_box: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Prepare one task and split, go on with what a killed run left, or reuse what is there.

    Args:
        root: data root in ScanNet's layout (``data/sources/scannet.py``).
        options: of the task.
        out: folder to make; one with the same options and inputs is reused, another is refused.
        workers: processes; 1 works in this one.
        skip_broken_scenes: drop the items of scenes that cannot be used, instead of refusing.
        skip_without_box: drop the items that name objects without a box, instead of refusing.
        quiet: print only what a user must know.

    Raises:
        ValueError: an option, a file, annotations or scenes cannot be used; scenes and annotations are looked at to
            the end, and the first ten problems named. Another process prepares this folder.
    """
    plan, out = make_plan(root, options), Path(out)
    files, scenes = task_inputs(plan), scene_inputs(plan)
    of_scenes = {name: digest for scene in scenes.values() for name, digest in scene.items()}
    wanted = description(plan, skip_broken_scenes, {**files, **of_scenes}, skip_without_box)
    if not reusable(out, wanted):
        # The skip options are not part of a scene's key: files of unaffected scenes stay valid when they change.
        common = {**wanted, "inputs": files, "options": recorded_options(options)}
        keys = {scene_id: key_of(common, inputs) for scene_id, inputs in scenes.items()}
        with locked(out.with_name(out.name + ".lock"), f"{out} is being prepared", "give --out another folder"):
            if not reusable(out, wanted):  # another process may just have finished it
                _check_folder(out)
                failures = _prepare_scenes(plan, out, keys, skip_without_box, workers, quiet)
                broken = _broken(plan, failures, skip_broken_scenes)
                return Prepared(out, _finish(plan, out, wanted, broken), reused=False)
    return Prepared(out, read_manifest(out), reused=True)


def _check_folder(out: Path) -> None:
    """Create the folder; raise ``ValueError`` if it holds files that no preparation wrote."""
    out.mkdir(parents=True, exist_ok=True)
    others = [
        path for path in out.iterdir() if path.suffix not in (".parquet", ".partial", EMPTY) and path.name != DROPPED
    ]
    others += [path for path in out.glob("*.parquet") if _is_readable(path) and _metadata(path) is None]
    if others:
        raise ValueError(f"{out} holds {others[0].name}, which no preparation wrote; give --out another folder.")


def _prepare_scenes(
    plan: Plan, out: Path, keys: Mapping[str, str], skip_without_box: bool, workers: int, quiet: bool
) -> list[_Failure]:
    """Write the files of scenes that are not done yet; return what is wrong with scenes."""
    todo = [job for job in plan.jobs if not _is_done(out, job.scene_id, keys[job.scene_id], skip_without_box)]
    if todo and len(todo) < len(plan.jobs):
        done = len(plan.jobs) - len(todo)
        print(f"{out}: {done} of {len(plan.jobs)} scenes are done already", flush=True)
    failures = []
    with progress(f"{plan.options.task} {plan.options.split}: scenes", len(todo), quiet) as advance:
        arguments = [(plan.root, plan.options, job, out, keys[job.scene_id], skip_without_box) for job in todo]
        # Another process could not unpickle the classes of a plug-in file.
        workers = workers if type(plan.task).__module__.startswith("w2r2_ds.") else 1
        for failure in run_all(_write_scene, arguments, workers):
            failures += [failure] if failure else []
            advance()
    return failures


def _is_done(out: Path, scene_id: str, key: str, skip_without_box: bool) -> bool:
    """Whether the scene's file is complete and made from the same options and inputs."""
    found = _scene_record(out, scene_id)
    if found is None or found["key"] != key:
        return False
    return skip_without_box or all(each["reason"] != NO_BOX for each in found["dropped"])


def _write_scene(
    root: Path, options: TaskOptions, job: Job, out: Path, key: str, skip_without_box: bool
) -> _Failure | None:
    """Write one scene's file. Errors are returned, so that the caller can report those of all scenes."""
    try:
        outcomes, lost = scene_outcomes(root, options, job, skip_without_box=skip_without_box)
    except WrongAnnotations as error:
        return _Failure(job.scene_id, error.sentences, annotations=True)
    except ValueError as error:
        return _Failure(job.scene_id, [str(error)], annotations=False)
    samples = [(number, outcome) for number, outcome in outcomes if isinstance(outcome, Sample)]
    dropped = [{"number": number, **asdict(each)} for number, each in outcomes if isinstance(each, Dropped)]
    record = {"key": key, "dropped": dropped, "frames_without_pose": lost}
    scene, empty = (out / f"{job.scene_id}{suffix}" for suffix in (".parquet", EMPTY))
    written, other = (scene, empty) if samples else (empty, scene)
    write_samples(written, samples, root, {METADATA: json.dumps(record)})
    other.unlink(missing_ok=True)
    return None


def _scene_record(out: Path, scene_id: str) -> dict[str, Any] | None:
    """Key, dropped items and lost frames of a scene that is done; None for other scenes."""
    return _metadata(out / f"{scene_id}.parquet") or _metadata(out / f"{scene_id}{EMPTY}")


def _metadata(path: Path) -> dict[str, Any] | None:
    """The record that `_write_scene` stored in a scene's file; None if there is no such complete file."""
    if not _is_readable(path):
        return None
    stored = (pq.read_schema(path).metadata or {}).get(METADATA.encode())
    return None if stored is None else dict(json.loads(stored))


def _is_readable(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):  # missing or truncated: a full disk cuts files
        return False
    return True


def scene_outcomes(root: Path, options: TaskOptions, job: Job, skip_without_box: bool = False) -> tuple[Outcomes, int]:
    """What becomes of one scene's items, and how many of its frames have no valid pose.

    Raises:
        WrongAnnotations: they name objects that the scene lacks, and may not be left out.
        ValueError: the scene cannot be used.
    """
    task = find_task(options.task)
    if task.needs_infos(options) and job.info is None:
        raise ValueError(f"{job.scene_id}: EmbodiedScan's infos do not have this scene; use visibility depth without")
    if task.needs_proposals(options) and job.proposals is None:
        raise ValueError(f"{job.scene_id}: the proposals do not have this scene; use boxes annotated without")
    scene = load_scene(root, job.scene_id)
    outcomes: Outcomes = []
    if skip_without_box:
        job, left = split_by_boxes(scene, job)
        detail = f"its object has no box in {scene.scene_id}_aligned_bbox.npy"
        items = task.items(left, options)
        outcomes = [(number, Dropped(identity, NO_BOX, where, detail)) for number, identity, where in items]
    check_objects(scene, job)
    if not outcomes or job.items:
        kind = task.kind(options)
        outcomes += [
            (number, replace(made, kind=kind) if isinstance(made, Sample) else made)
            for number, made in task.make(scene, job, options)
        ]
    check_frames([outcome for _, outcome in outcomes if isinstance(outcome, Sample)])
    return outcomes, scene.dropped_frames


def _broken(plan: Plan, failures: Sequence[_Failure], skip: bool) -> list[_Failure]:
    """The scenes to leave out; raises what may not be left out, in the order of the annotations."""
    rank = {job.scene_id: job.number for job in plan.jobs}
    failures = sorted(failures, key=lambda failure: rank[failure.scene_id])
    wrong = [sentence for failure in failures if failure.annotations for sentence in failure.sentences]
    if wrong:
        head = f"{len(wrong)} annotations do not belong to the scenes (--skip_without_box leaves them out)"
        raise ValueError(listed(head, wrong))
    if failures and not skip:
        head = f"{len(failures)} of {len(plan.jobs)} scenes cannot be used (--skip_broken_scenes leaves them out)"
        raise ValueError(listed(head, [sentence for failure in failures for sentence in failure.sentences]))
    return list(failures)


def _finish(plan: Plan, out: Path, wanted: Mapping[str, Any], broken: Sequence[_Failure]) -> dict[str, Any]:
    """Write dropped.jsonl and the manifest, and remove files of scenes that do not belong to the data set."""
    sentences = {failure.scene_id: " ".join(failure.sentences) for failure in broken}
    annotations = plan.task.annotations(plan.root, plan.options).path
    dropped: list[dict[str, Any]] = []
    samples = scenes = lost = 0
    files = []
    for job in plan.jobs:
        if job.scene_id in sentences:
            dropped += [
                {"number": number, **asdict(Dropped(identity, BROKEN_SCENE, where, sentences[job.scene_id]))}
                for number, identity, where in plan.task.items(job, plan.options)
            ]
            continue
        record = _scene_record(out, job.scene_id)
        assert record is not None, "every other scene has its file"
        scenes += 1
        path = out / f"{job.scene_id}.parquet"
        if path.is_file():
            files.append(path)
            samples += pq.read_metadata(path).num_rows
        lost += record["frames_without_pose"]
        dropped += record["dropped"]
    reasons = Counter(each["reason"] for each in dropped)
    if not samples:
        raise ValueError(
            f"No sample can be made of {annotations}: {dict(reasons) or 'it has nothing for these options'}."
        )
    for path in {*out.glob("*.parquet"), *out.glob(f"*{EMPTY}")} - set(files):  # also of earlier annotations
        path.unlink()
    dropped.sort(key=lambda each: each["number"])
    lines = [json.dumps({name: value for name, value in each.items() if name != "number"}) + "\n" for each in dropped]
    atomic_io.replace(out / DROPPED, "".join(lines))
    manifest = {
        **wanted,
        "counts": counts(plan, samples, scenes, lost),
        "dropped": dict(sorted(reasons.items())),
        "files": {path.name: file_sha256(path) for path in [*files, out / DROPPED]},
    }
    atomic_io.replace(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest
