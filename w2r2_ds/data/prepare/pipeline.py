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

from w2r2_ds.data.dataset import FRAMES, MANIFEST, SAMPLES, write_tables
from w2r2_ds.data.prepare.inputs import annotation_source, needs_infos, needs_proposals
from w2r2_ds.data.prepare.manifest import counts, description, file_hash, key_of, reusable, scene_inputs, task_inputs
from w2r2_ds.data.prepare.plan import Plan, items_of, make_plan, recorded_options
from w2r2_ds.data.prepare.shards import Numbered, assemble, has_shard, write_dropped, write_shard
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks import detection, scan2cap, scanqa, scanrefer
from w2r2_ds.data.tasks.base import (
    BROKEN_SCENE,
    NO_BOX,
    Dropped,
    Job,
    Outcomes,
    TaskOptions,
    WrongAnnotations,
    check_objects,
    part_by_boxes,
)
from w2r2_ds.data.validate import check_frames
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.file_lock import locked
from w2r2_ds.utils.parallel import listed, run_all
from w2r2_ds.utils.progress import progress

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
        # Whoever leaves broken scenes or items without a box out after all keeps what is done.
        asked = {**wanted, "inputs": files, "options": recorded_options(options)}
        work = _Work(plan, out.with_name(out.name + ".partial"), skip_without_box, asked, scenes)
        with locked(out.with_name(out.name + ".lock"), f"{out} is being prepared", "give --out another folder"):
            if not reusable(out, wanted):  # another process may just have made it
                _open_partial(work.partial, asked)
                broken = _broken(plan, _make_shards(work, workers, quiet), skip_broken_scenes)
                return Prepared(out, _finish(plan, work.partial, out, wanted, broken), reused=False)
    return Prepared(out, json.loads((out / MANIFEST).read_text(encoding="utf-8")), reused=True)


@dataclass(frozen=True)
class _Work:
    """What is made into which folder of shards.

    Attributes:
        plan: of the task.
        partial: folder of shards.
        skip_without_box: leave out items whose objects have no box.
        asked: what all scenes depend on.
        scenes: scene -> hashes of what it alone depends on.
    """

    plan: Plan
    partial: Path
    skip_without_box: bool
    asked: Mapping[str, Any]
    scenes: Mapping[str, Mapping[str, str]]

    def key(self, scene_id: str, left_out: bool = False) -> str:
        """Of a scene's shard; another one where items without a box were left out, which not everybody wants."""
        return key_of(self.asked, self.scenes[scene_id], *([NO_BOX] if left_out else []))

    def is_done(self, scene_id: str) -> bool:
        """Whether the scene has a shard of just this."""
        choices = (False, True) if self.skip_without_box else (False,)
        return any(has_shard(self.partial, scene_id, self.key(scene_id, left_out)) for left_out in choices)


def _make_shards(work: _Work, workers: int, quiet: bool) -> list[_Failure]:
    """Make the shards that are not there yet; what was wrong with scenes."""
    plan = work.plan
    todo = [job for job in plan.jobs if not work.is_done(job.scene_id)]
    if todo and len(todo) < len(plan.jobs):
        done = len(plan.jobs) - len(todo)
        print(f"{work.partial}: {done} of {len(plan.jobs)} scenes are done already", flush=True)
    failures = []
    with progress(f"{plan.options.task} {plan.options.split}: scenes", len(todo), quiet) as advance:
        arguments = [
            (plan.root, plan.options, job, work.partial, work.key(job.scene_id))
            + ((work.key(job.scene_id, True),) if work.skip_without_box else ())
            for job in todo
        ]
        for failure in run_all(_write_scene, arguments, workers):
            failures += [failure] if failure else []
            advance()
    return failures


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


def _write_scene(
    root: Path, options: TaskOptions, job: Job, partial: Path, key: str, key_without: str | None = None
) -> _Failure | None:
    """Make one scene's shard; what is wrong comes back as sentences, so that all scenes can be looked at.

    `key_without` is the shard's key if items without a box are left out; None where they may not be.
    """
    try:
        outcomes, lost = scene_outcomes(root, options, job, skip_without_box=key_without is not None)
    except WrongAnnotations as error:
        return _Failure(job.scene_id, error.sentences, annotations=True)
    except ValueError as error:
        return _Failure(job.scene_id, [str(error)], annotations=False)
    left_out = any(isinstance(outcome, Dropped) and outcome.reason == NO_BOX for _, outcome in outcomes)
    write_shard(partial, job.scene_id, key_without if left_out and key_without else key, outcomes, lost, root)
    return None


def scene_outcomes(root: Path, options: TaskOptions, job: Job, skip_without_box: bool = False) -> tuple[Outcomes, int]:
    """What becomes of one scene's items, and how many of its frames have no valid pose.

    Raises:
        WrongAnnotations: they name objects that the scene lacks, and may not be left out.
        ValueError: the scene cannot be used.
    """
    if needs_infos(options) and job.info is None:
        raise ValueError(f"{job.scene_id}: EmbodiedScan's infos do not have this scene; use visibility depth without")
    if needs_proposals(options) and job.proposals is None:
        raise ValueError(f"{job.scene_id}: the proposals do not have this scene; use boxes annotated without")
    scene = load_scene(root, job.scene_id)
    outcomes: Outcomes = []
    if skip_without_box:
        job, left = part_by_boxes(scene, job)
        detail = f"its object has no box in {scene.scene_id}_aligned_bbox.npy"
        items = items_of(left, options, annotation_source(root, options).path)
        outcomes = [(number, Dropped(identity, NO_BOX, where, detail)) for number, identity, where in items]
    check_objects(scene, job)
    if not outcomes or job.descriptions or job.questions:
        outcomes += _MAKE[options.task](scene, job, options)
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
