"""From the files of a task to one job per scene, before any scene is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.prepare.inputs import annotation_source, infos_files, needs_infos, needs_proposals, sources
from w2r2_ds.data.sources.annotations import Description, read_scanqa, read_scanrefer
from w2r2_ds.data.sources.embodiedscan import ScanInfo, read_infos
from w2r2_ds.data.sources.labels import groups, nyu40_class, read_labels, scannet_class
from w2r2_ds.data.sources.proposals import read_proposals
from w2r2_ds.data.tasks.base import Job, TaskOptions
from w2r2_ds.data.tasks.scan2cap import object_key

FORMATS = {
    "scanrefer": ("vgllm", "video3dllm"),
    "scan2cap": ("vgllm", "video3dllm"),
    "scanqa": ("video3dllm",),
    "detection": ("vgllm",),
}
SPLITS = {"scanqa": ("train", "val", "test_w_obj", "test_wo_obj")}

PUBLISHED = {
    ("scanrefer", "train"): 36665,
    ("scanrefer", "val"): 9508,
    ("scan2cap", "train"): 36665,
    ("scan2cap", "val"): 2068,
    ("scanqa", "val"): 4675,
}
"""How many items the complete annotations have: descriptions, objects of Scan2Cap's validation, questions."""


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        root: data root.
        options: of the task.
        jobs: one per scene, in the order in which the annotations first name them.
        files: the task's inputs, besides the scenes.
        unit: what is counted: descriptions, objects, questions or scenes.
        items: how many of them there are.
    """

    root: Path
    options: TaskOptions
    jobs: tuple[Job, ...]
    files: tuple[Path, ...]
    unit: str
    items: int

    @property
    def published(self) -> int | None:
        """How many items the complete annotations have; None where nobody says."""
        return PUBLISHED.get((self.options.task, self.options.split))


def check_options(options: TaskOptions) -> None:
    """Refuse what cannot be prepared.

    Raises:
        ValueError: names the option, its value and what there is.
    """
    if options.format not in FORMATS[options.task]:
        raise ValueError(f"--format is {options.format}; {options.task} has {' and '.join(FORMATS[options.task])}.")
    splits = SPLITS.get(options.task, ("train", "val"))
    if options.split not in splits:
        raise ValueError(f"--splits names {options.split!r}; {options.task} has {', '.join(splits)}.")
    for name, value, least in (
        ("rolls", options.rolls, 1),
        ("interval", options.interval, 1),
        ("step", options.step, 1),
        ("windows", options.windows, 0),
    ):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}.")
    if options.rolls > 1 and options.frames.protocol != "vgllm":
        raise ValueError(
            f"--rolls is {options.rolls}, but frames.protocol {options.frames.protocol} gives every roll the same "
            "frames; use protocol vgllm or one roll."
        )
    options.frames.check()


def recorded_options(options: TaskOptions) -> dict[str, Any]:
    """The options that the samples of this task depend on, as plain values."""
    names = ["split", "format", "frames"]
    if options.looks:
        names.append("visibility")
    if options.task == "scanrefer" and options.format == "vgllm":
        names.append("rolls")
    elif options.task == "scan2cap" and options.split != "train":
        names.append("boxes")
    elif options.task == "detection":
        names += ["interval", "step", "windows"]
    every = asdict(options)
    frames = {name: str(value) if isinstance(value, Path) else value for name, value in every["frames"].items()}
    if options.task == "detection":
        frames = {name: frames[name] for name in ("count", "seed")}
    return {name: frames if name == "frames" else every[name] for name in names}


def make_plan(root: Path | str, options: TaskOptions) -> Plan:
    """Read the files of a task.

    Raises:
        ValueError: an option or a file cannot be used; the message names it.
    """
    root = Path(root)
    check_options(options)
    files = tuple(source.path for source in sources(root, options))
    path = annotation_source(root, options).path
    if options.task == "detection":
        infos = read_infos(path)
        detections = tuple(Job(scene_id, number, info=info) for number, (scene_id, info) in enumerate(infos.items()))
        return Plan(root, options, detections, files, "scenes", len(infos))
    if options.task == "scanqa":
        questions = read_scanqa(path, answers_needed=options.split in ("train", "val"))
        jobs = tuple(Job(scene, i, questions=of) for i, (scene, of) in enumerate(_by_scene(questions).items()))
        return Plan(root, options, jobs, files, "questions", len(questions))
    descriptions = read_scanrefer(path)
    jobs = _description_jobs(root, options, descriptions)
    if options.task == "scan2cap" and options.split != "train":
        return Plan(root, options, jobs, files, "objects", len({object_key(each) for each in descriptions}))
    return Plan(root, options, jobs, files, "descriptions", len(descriptions))


def items_of(job: Job, options: TaskOptions, file: Path) -> list[tuple[int, str, str]]:
    """Number, id and place of everything that a job would make samples of."""
    if options.task == "detection":
        return [(job.number, job.scene_id, f"{file}: scannet/{job.scene_id}")]
    if options.task == "scanqa":
        return [(number, each.question_id, each.where) for number, each in job.questions]
    if options.task == "scanrefer" or options.split == "train":
        return [(number, each.key, each.where) for number, each in job.descriptions]
    first: dict[str, tuple[int, str, str]] = {}
    for number, each in job.descriptions:
        first.setdefault(object_key(each), (number, object_key(each), each.where))
    return list(first.values())


def _description_jobs(root: Path, options: TaskOptions, descriptions: Sequence[Description]) -> tuple[Job, ...]:
    labels = read_labels(root)
    by_scannet = groups(descriptions, labels, scannet_class)
    by_nyu40 = groups(descriptions, labels, nyu40_class)
    scenes = _by_scene(descriptions)
    infos = _read_infos(root, options, scenes)
    proposals = _read_proposals(root, options)
    jobs = []
    for number, (scene_id, of) in enumerate(scenes.items()):
        objects = {about.object_id for _, about in of}
        jobs.append(
            Job(
                scene_id,
                number,
                descriptions=of,
                groups={each: (by_scannet[scene_id, each], by_nyu40[scene_id, each]) for each in objects},
                classes={about.object_name: scannet_class(about.object_name, labels) for _, about in of},
                info=infos.get(scene_id),
                proposals=proposals.get(scene_id),
            )
        )
    return tuple(jobs)


def _by_scene(items: Sequence[Any]) -> dict[str, tuple[tuple[int, Any], ...]]:
    """Scene -> its items with their numbers; scenes in order of appearance."""
    scenes: dict[str, list[tuple[int, Any]]] = {}
    for number, item in enumerate(items):
        scenes.setdefault(item.scene_id, []).append((number, item))
    return {scene_id: tuple(of) for scene_id, of in scenes.items()}


def _read_infos(root: Path, options: TaskOptions, scenes: Mapping[str, Any]) -> Mapping[str, ScanInfo]:
    """EmbodiedScan's infos of these scenes, where the task wants them; a scene may lack.

    Scenes that the split's own file lacks are looked for in the other one, if it is there: VG-LLM joins them all.
    """
    if not needs_infos(options):
        return {}
    found: dict[str, ScanInfo] = {}
    for path in infos_files(root, options.split):
        if not found or any(scene_id not in found for scene_id in scenes):
            found = {**read_infos(path), **found}
    return {scene_id: found[scene_id] for scene_id in scenes if scene_id in found}


def _read_proposals(root: Path, options: TaskOptions) -> Mapping[str, np.ndarray]:
    if not needs_proposals(options):
        return {}
    path = next(source.path for source in sources(root, options) if source.name == "proposals")
    return read_proposals(path)
