"""Trial of a preparation, for ``--check`` and ``--dry_run``: all files are read, but no sample is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2r2_ds.data.prepare.pipeline import SceneFailure, attempt_scene, check_samples, task_workers
from w2r2_ds.data.prepare.plan import Plan, check_options, input_files, make_plan
from w2r2_ds.data.prepare.unseen import Unseen, check_unseen, count_unseen
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks.base import Job, TaskOptions, parts_to_read
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.findings import Finding, by_kind, by_pattern
from w2r2_ds.utils.parallel import run_all
from w2r2_ds.utils.progress import progress

SAMPLE_BYTES, FRAME_BYTES = 130, 160
"""Compressed bytes of a sample of 32 frames, and of a frame, in a Parquet file of sentences of random words."""


@dataclass(frozen=True)
class Trial:
    """What a preparation would do.

    Attributes:
        name: task and split.
        problems: one line per kind of problem for which the preparation would stop.
        broken_scenes: the same of scenes that the preparation skips.
        skipped_inputs: one line per kind of lost frames and broken boxes, which the preparation skips.
        samples: number of samples.
        frames: number of distinct frames of the samples.
        size: number and unit of the annotations, and number of scenes; empty if they are unknown.
    """

    name: str
    problems: tuple[str, ...]
    broken_scenes: tuple[str, ...] = ()
    skipped_inputs: tuple[str, ...] = ()
    samples: int = 0
    frames: int = 0
    size: str = ""

    def report(self) -> str:
        """The result as text: the problems, or the number of samples."""
        inputs = [f"  skipped input: {line}" for line in self.skipped_inputs]
        inputs += [f"  skipped scene: {line}" for line in self.broken_scenes]
        if not self.problems:
            found = "some scenes cannot be used" if self.broken_scenes else "everything is here"
            return "\n".join([f"{self.name}: {found}", *inputs])
        kinds = "1 kind of problem" if len(self.problems) == 1 else f"{len(self.problems)} kinds of problems"
        head = f"{self.name}: {kinds}; docs/guides/own-dataset.md has the sources of all files"
        return "\n".join([head, *(f"  {line}" for line in self.problems), *inputs])

    def forecast(self, out: Path) -> str:
        """Number of samples and size on disk as text."""
        size = self.samples * SAMPLE_BYTES + self.frames * FRAME_BYTES
        return (
            f"{out}: {self.samples} samples of {self.size}, {self.frames} frames; about {size / 1e6:.1f} MB; nothing "
            "was written"
        )


@dataclass(frozen=True)
class _SceneTrial:
    """Result of one scene; `failure` is None if it can be prepared."""

    scene_id: str
    failure: SceneFailure | None
    samples: int = 0
    frames: int = 0
    skipped: tuple[str, ...] = ()
    skipped_inputs: tuple[Finding, ...] = ()
    unseen: Unseen = field(default_factory=Unseen)


def try_preparation(
    root: Path | str,
    options: TaskOptions,
    workers: int = 1,
    skip_broken_scenes: bool = True,
    skip_without_box: bool = False,
    quiet: bool = False,
) -> Trial:
    """Read all input files of a task and split as `pipeline.prepare` does, and collect the problems.

    If the annotations cannot be read, the scenes in posed_images/ are read. The arguments are those of `prepare`.

    Raises:
        ValueError: an option is invalid.
    """
    root = Path(root)
    check_options(options)
    name = f"{options.task} {options.split}"
    missing = [
        f"{file.path} does not exist; from {file.origin}"
        for file in input_files(root, options)
        if not file.path.is_file()
    ]
    try:
        plan = make_plan(root, options)
    except ValueError as error:
        known = [] if missing else str(error).splitlines()
        arguments = [(root, options, scene_id) for scene_id in _extracted(root)]
        trials = _run(_read_scene, name, arguments, workers, quiet)
        messages = _messages([trial.failure for trial in trials if trial.failure])
        if not trials:
            known.append(f"{root / 'posed_images'} has no scenes; which are needed is not known without annotations")
        return Trial(name, tuple([*missing, *known, *messages]), skipped_inputs=_skipped_inputs(trials))
    jobs = [(root, options, job, skip_without_box) for job in plan.jobs]
    trials = _run(_try_scene, name, jobs, task_workers(plan.task, workers), quiet)
    return _result(plan, name, missing, trials, skip_broken_scenes)


def _result(plan: Plan, name: str, missing: Sequence[str], trials: Sequence[_SceneTrial], skip: bool) -> Trial:
    """Add up the results of all scenes; `skip` is the option ``skip_broken_scenes``."""
    failures = [trial.failure for trial in trials if trial.failure is not None]
    problems = [*missing, *_messages([failure for failure in failures if failure.is_annotation_error])]
    broken = _messages([failure for failure in failures if not failure.is_annotation_error])
    samples = sum(trial.samples for trial in trials)
    if not skip or len(failures) == len(plan.jobs):
        problems, broken = [*problems, *broken], []
    if not problems:
        try:
            unseen = sum((trial.unseen for trial in trials), Unseen())
            check_unseen(unseen, plan.options, str(plan.task.annotations(plan.root, plan.options).path))
            check_samples(plan, samples, Counter(reason for trial in trials for reason in trial.skipped))
        except ValueError as error:
            problems.append(str(error))
    published = ""
    if plan.published is not None:
        published = " (as published)" if plan.items == plan.published else f" ({plan.published} are published)"
    return Trial(
        name,
        tuple(problems),
        tuple(broken),
        _skipped_inputs(trials),
        samples,
        sum(trial.frames for trial in trials),
        f"{plan.items} {plan.unit}{published}, {len(plan.jobs)} scenes",
    )


def _run(
    call: Callable[..., _SceneTrial], name: str, arguments: Sequence[tuple[Any, ...]], workers: int, quiet: bool
) -> list[_SceneTrial]:
    """Results of all scenes, in the order of the arguments' scene names."""
    with progress(f"{name}: scenes", len(arguments), quiet) as advance:
        trials = []
        for trial in run_all(call, arguments, workers):
            trials.append(trial)
            advance()
    return sorted(trials, key=lambda trial: trial.scene_id)


def _try_scene(root: Path, options: TaskOptions, job: Job, skip_without_box: bool) -> _SceneTrial:
    """Prepare one scene without writing it (in a worker process)."""
    prepared = attempt_scene(root, options, job, skip_without_box)
    if isinstance(prepared, SceneFailure):
        return _SceneTrial(job.scene_id, prepared)
    samples = [item for _, item in prepared.items if isinstance(item, Sample)]
    return _SceneTrial(
        job.scene_id,
        None,
        len(samples),
        len({path for sample in samples for path in sample.frames}),
        tuple(item.reason for _, item in prepared.items if not isinstance(item, Sample)),
        prepared.skipped_inputs,
        count_unseen(prepared.items, options),
    )


def _read_scene(root: Path, options: TaskOptions, scene_id: str) -> _SceneTrial:
    """Read the files of one scene (in a worker process)."""
    try:
        scene = load_scene(root, scene_id, parts_to_read(options))
    except ValueError as error:
        return _SceneTrial(scene_id, SceneFailure(scene_id, str(error).splitlines(), is_annotation_error=False))
    return _SceneTrial(scene_id, None, skipped_inputs=scene.skipped_inputs)


def _messages(failures: Sequence[SceneFailure]) -> list[str]:
    """One line per kind of error."""
    return by_pattern((failure.scene_id, message) for failure in failures for message in failure.messages)


def _skipped_inputs(trials: Sequence[_SceneTrial]) -> tuple[str, ...]:
    return tuple(by_kind(finding for trial in trials for finding in trial.skipped_inputs))


def _extracted(root: Path) -> list[str]:
    """Scenes in posed_images/."""
    folder = root / "posed_images"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
