"""Preflight checks of a preparation: missing or truncated input files (``--check``), and its size (``--dry_run``)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from w2r2_ds.data.prepare.manifest import relative
from w2r2_ds.data.prepare.plan import BOXES, EXTRACTED, Plan, check_options, input_files, make_plan, scene_files
from w2r2_ds.data.sources.scannet import SceneParts, frame_files
from w2r2_ds.data.tasks.base import TASKS, TaskOptions, parts_to_read
from w2r2_ds.data.tasks.common import SCANNET_ACCESS
from w2r2_ds.data.validate import THREADS, is_complete_image

SAMPLE_BYTES, FRAME_BYTES = 130, 160
"""Compressed bytes of a sample of 32 frames, and of a frame, in a Parquet file of sentences of random words."""


@dataclass(frozen=True)
class Missing:
    """A missing, truncated or unreadable input file.

    Attributes:
        path: path of the file or folder.
        problem: description, such as ``missing`` or ``truncated``.
        origin: source for a download, or the command that writes it.
    """

    path: Path
    problem: str
    origin: str


def missing(root: Path | str, options: TaskOptions) -> list[Missing]:
    """All input files of a task and split that are missing, truncated or unreadable.

    The scenes are those of the annotations, or those in posed_images/ if the annotations cannot be read. Every image
    must have the end marker of a JPEG or a PNG; images are not decoded.
    """
    root = Path(root)
    check_options(options)
    found = [
        Missing(file.path, "missing", file.origin) for file in input_files(root, options) if not file.path.is_file()
    ]
    scenes, unusable = _scenes(root, options, bool(found))
    for scene_id in scenes:
        found += _missing_of_scene(root, scene_id, options)
    if not scenes:
        parts = parts_to_read(options)
        folders = {"posed_images": EXTRACTED}
        if SceneParts.POSES in parts:
            folders["scans"] = SCANNET_ACCESS
        if SceneParts.BOXES in parts:
            folders["scannet_data"] = BOXES
        unknown = "missing; which scenes are needed is not known before the annotations are here"
        found += [
            Missing(root / name, unknown, origin) for name, origin in folders.items() if not (root / name).is_dir()
        ]
    return unusable + found


def report(root: Path | str, options: TaskOptions, found: list[Missing]) -> str:
    """The result of `missing` as text, grouped by origin."""
    name = f"{options.task} {options.split}"
    if not found:
        return f"{name}: everything is here"
    files = "1 file or folder is" if len(found) == 1 else f"{len(found)} files or folders are"
    lines = [f"{name}: {files} missing or damaged"]
    for origin in dict.fromkeys(file.origin for file in found):
        lines.append(f"  from {origin}")
        lines += [f"    {relative(file.path, Path(root))}: {file.problem}" for file in found if file.origin == origin]
    return "\n".join(lines)


def forecast(plan: Plan, out: Path) -> str:
    """Upper bounds of the number of samples and of the size, from the annotations and the names of the frames."""
    listed = sum(len(list((plan.root / "posed_images" / job.scene_id).glob("*.jpg"))) for job in plan.jobs)
    samples = plan.task.most_samples(plan.jobs, plan.options, listed)
    size = samples * SAMPLE_BYTES + listed * FRAME_BYTES
    published = ""
    if plan.published is not None:
        published = " (as published)" if plan.items == plan.published else f" ({plan.published} are published)"
    return (
        f"{out}: at most {samples} samples of {plan.items} {plan.unit}{published}, {len(plan.jobs)} scenes, "
        f"{listed} frames; about {size / 1e6:.1f} MB; nothing was written"
    )


def _scenes(root: Path, options: TaskOptions, incomplete: bool) -> tuple[list[str], list[Missing]]:
    """The scenes to check, and the input files that cannot be parsed or that lack scenes.

    The annotations are not read if input files are missing (`incomplete`).
    """
    if not incomplete:
        try:
            plan = make_plan(root, options)
        except ValueError as error:
            # The file is the one in the message; if the message has none, the annotations.
            named = [file for file in input_files(root, options) if str(file.path) in str(error)]
            source = named[0] if named else TASKS.find(options.task).annotations(root, options)
            return _extracted(root), [Missing(source.path, str(error), source.origin)]
        return [job.scene_id for job in plan.jobs], list(_lacking(plan))
    return _extracted(root), []


def _lacking(plan: Plan) -> Iterator[Missing]:
    """Entries for the scenes that EmbodiedScan's infos or the proposals lack."""
    # Reversed: of the infos of both splits, the split's own come first and must win.
    files = {file.name: file for file in reversed(input_files(plan.root, plan.options))}
    for job in plan.jobs:
        if plan.task.needs_infos(plan.options) and job.info is None:
            yield Missing(files["infos"].path, f"does not have {job.scene_id}", files["infos"].origin)
        if plan.task.needs_proposals(plan.options) and job.proposals is None:
            yield Missing(files["proposals"].path, f"does not have {job.scene_id}", files["proposals"].origin)


def _extracted(root: Path) -> list[str]:
    """Scenes in posed_images/."""
    folder = root / "posed_images"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _missing_of_scene(root: Path, scene_id: str, options: TaskOptions) -> Iterator[Missing]:
    """Missing or truncated files of one scene."""
    folder = root / "posed_images" / scene_id
    if not folder.is_dir():
        yield Missing(folder, "missing", EXTRACTED)
    for file in scene_files(root, scene_id, options):
        # Of a missing folder, the files are not listed too.
        if not file.path.is_file() and (file.path.parent != folder or folder.is_dir()):
            yield Missing(file.path, "missing", file.origin)
    if not folder.is_dir():
        return
    suffixes = frame_files(parts_to_read(options))
    names = {path.name for path in folder.iterdir()}
    paths = [Path(name) for name in names]
    stems = sorted({path.stem for path in paths if path.suffix in suffixes and path.stem.isdecimal()}, key=int)
    if not stems:
        yield Missing(folder, "holds no frames", EXTRACTED)
    images = []
    for stem in stems:
        for suffix in suffixes:
            if stem + suffix not in names:
                yield Missing(folder / (stem + suffix), "missing", EXTRACTED)
            elif suffix != ".txt":
                images.append(folder / (stem + suffix))
    with ThreadPoolExecutor(THREADS) as pool:
        for path, is_complete in zip(images, pool.map(is_complete_image, images), strict=True):
            if not is_complete:
                yield Missing(path, "truncated, or no image", EXTRACTED)
