"""Prepare one task and split: scenes in parallel, a shard each, put together in the order of the annotations.

``OUT.partial/`` holds the shards until the data set is whole; a run that was killed goes on from there. Then
samples.parquet, frames.parquet, dropped.jsonl and, last, manifest.json are written aside and the folder is renamed into
place, so ``OUT`` is whole or is not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.data.check import check_frames
from w2r2_ds.data.inputs import annotation_source, needs_infos, needs_proposals
from w2r2_ds.data.manifest import counts, description, file_hash, key_of, reusable, scene_inputs, task_inputs
from w2r2_ds.data.plan import Plan, items_of, make_plan, recorded_options
from w2r2_ds.data.prepared import FRAMES, MANIFEST, SAMPLES, write_tables
from w2r2_ds.data.progress import progress
from w2r2_ds.data.sample import Sample
from w2r2_ds.data.scannet import load_scene
from w2r2_ds.data.shards import Numbered, assemble, has_shard, write_dropped, write_shard
from w2r2_ds.data.tasks import detection, scan2cap, scanqa, scanrefer
from w2r2_ds.data.tasks.outcome import (
    BROKEN_SCENE,
    Dropped,
    Job,
    Outcomes,
    TaskOptions,
    WrongAnnotations,
    check_objects,
)
from w2r2_ds.data.workers import listed, run_all

DROPPED = "dropped.jsonl"

_MAKE = {"scanrefer": scanrefer.make, "scan2cap": scan2cap.make, "scanqa": scanqa.make, "detection": detection.make}


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
    quiet: bool = False,
) -> Prepared:
    """Prepare one task and split, go on with what a killed run left, or reuse what is there.

    Args:
        root: data root in ScanNet's layout (``data/scannet.py``).
        options: of the task.
        out: folder to make; one with the same options and inputs is reused, another is refused.
        workers: processes; 1 works in this one.
        skip_broken_scenes: drop the items of scenes that cannot be used, instead of refusing.
        quiet: print only what a user must know.

    Raises:
        ValueError: an option, a file, annotations or scenes cannot be used; scenes and annotations are looked at to
            the end, and the first ten problems named.
    """
    plan, out = make_plan(root, options), Path(out)
    files, scenes = task_inputs(plan), scene_inputs(plan)
    of_scenes = {name: digest for scene in scenes.values() for name, digest in scene.items()}
    wanted = description(plan, skip_broken_scenes, {**files, **of_scenes})
    if reusable(out, wanted):
        return Prepared(out, json.loads((out / MANIFEST).read_text(encoding="utf-8")), reused=True)
    partial = out.with_name(out.name + ".partial")
    # Whoever leaves broken scenes out after all keeps the others.
    asked = {**wanted, "inputs": files, "options": recorded_options(options)}
    _open_partial(partial, asked)
    keys = {job.scene_id: key_of(asked, scenes[job.scene_id]) for job in plan.jobs}
    todo = [job for job in plan.jobs if not has_shard(partial, job.scene_id, keys[job.scene_id])]
    if todo and len(todo) < len(plan.jobs):
        print(f"{partial}: {len(plan.jobs) - len(todo)} of {len(plan.jobs)} scenes are done already", flush=True)
    failures = []
    with progress(f"{options.task} {options.split}: scenes", len(todo), quiet) as advance:
        arguments = [(plan.root, options, job, partial, keys[job.scene_id]) for job in todo]
        for failure in run_all(_write_scene, arguments, workers):
            failures += [failure] if failure else []
            advance()
    broken = _broken(plan, failures, skip_broken_scenes)
    manifest = _finish(plan, partial, out, wanted, broken)
    return Prepared(out, manifest, reused=False)


def _open_partial(partial: Path, asked: Mapping[str, Any]) -> None:
    """Make the folder of shards, or keep it where the same was asked for.

    Raises:
        ValueError: a folder of this name is there that no preparation made.
    """
    record = partial / "asked.json"
    text = json.dumps(asked, indent=2) + "\n"
    if partial.exists() and any(partial.iterdir()):
        if not record.is_file():
            raise ValueError(f"{partial} is in the way, and no preparation made it; remove it, or give another --out.")
        if record.read_text(encoding="utf-8") == text:
            return
        print(f"{partial} was begun with other options or inputs; it is begun afresh", flush=True)
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    record.write_text(text, encoding="utf-8")


def _write_scene(root: Path, options: TaskOptions, job: Job, partial: Path, key: str) -> _Failure | None:
    """Make one scene's shard; what is wrong comes back as sentences, so that all scenes can be looked at."""
    try:
        outcomes, lost = scene_outcomes(root, options, job)
    except WrongAnnotations as error:
        return _Failure(job.scene_id, error.sentences, annotations=True)
    except ValueError as error:
        return _Failure(job.scene_id, [str(error)], annotations=False)
    write_shard(partial, job.scene_id, key, outcomes, lost, root)
    return None


def scene_outcomes(root: Path, options: TaskOptions, job: Job) -> tuple[Outcomes, int]:
    """What becomes of one scene's items, and how many of its frames have no valid pose.

    Raises:
        WrongAnnotations: they name objects that the scene lacks.
        ValueError: the scene cannot be used.
    """
    if needs_infos(options) and job.info is None:
        raise ValueError(f"{job.scene_id}: EmbodiedScan's infos do not have this scene; use visibility depth without")
    if needs_proposals(options) and job.proposals is None:
        raise ValueError(f"{job.scene_id}: the proposals do not have this scene; use boxes annotated without")
    scene = load_scene(root, job.scene_id)
    check_objects(scene, job)
    outcomes = _MAKE[options.task](scene, job, options)
    check_frames([outcome for _, outcome in outcomes if isinstance(outcome, Sample)])
    return outcomes, scene.dropped_frames


def _broken(plan: Plan, failures: Sequence[_Failure], skip: bool) -> list[_Failure]:
    """The scenes to leave out; raises what may not be left out, in the order of the annotations."""
    rank = {job.scene_id: job.number for job in plan.jobs}
    failures = sorted(failures, key=lambda failure: rank[failure.scene_id])
    wrong = [sentence for failure in failures if failure.annotations for sentence in failure.sentences]
    if wrong:
        raise ValueError(listed(f"{len(wrong)} annotations do not belong to the scenes", wrong))
    if failures and not skip:
        head = f"{len(failures)} of {len(plan.jobs)} scenes cannot be used (--skip_broken_scenes leaves them out)"
        raise ValueError(listed(head, [sentence for failure in failures for sentence in failure.sentences]))
    return list(failures)


def _finish(
    plan: Plan, partial: Path, out: Path, wanted: Mapping[str, Any], broken: Sequence[_Failure]
) -> dict[str, Any]:
    """Put the shards together and the folder into place."""
    sentences = {failure.scene_id: " ".join(failure.sentences) for failure in broken}
    whole = [job.scene_id for job in plan.jobs if job.scene_id not in sentences]
    samples, frames, dropped, lost = assemble(partial, whole)
    file = annotation_source(plan.root, plan.options).path
    for job in plan.jobs:
        if job.scene_id in sentences:
            dropped += [
                Numbered(number, Dropped(identity, BROKEN_SCENE, where, sentences[job.scene_id]))
                for number, identity, where in items_of(job, plan.options, file)
            ]
    reasons = Counter(each.dropped.reason for each in dropped)
    if not len(samples):
        raise ValueError(f"No sample can be made of {file}: {dict(reasons) or 'it has nothing for these options'}.")
    made = partial / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    write_tables(made, samples, frames)
    write_dropped(made / DROPPED, dropped)
    manifest = {
        **wanted,
        "counts": counts(plan, len(samples), len(whole), lost),
        "dropped": dict(sorted(reasons.items())),
        "files": {name: file_hash(made / name) for name in (SAMPLES, FRAMES, DROPPED)},
    }
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(made, out)
    shutil.rmtree(partial)
    return manifest
