"""Plan of a preparation: checked options, input files, and one job per scene, before any scene is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.scannet import alignment_file, boxes_file
from w2r2_ds.data.tasks.base import TASKS, InputFile, Job, Task, TaskOptions, is_validation, parts_to_read
from w2r2_ds.data.tasks.common import EMBODIEDSCAN, PROPOSALS, infos_files, proposals_file


@dataclass(frozen=True)
class Plan:
    """A task and split with one job per scene.

    Attributes:
        root: data root.
        options: task options.
        jobs: one per scene, in the order in which the annotations first name the scenes.
        files: the task's input files, besides the scenes.
    """

    root: Path
    options: TaskOptions
    jobs: tuple[Job, ...]
    files: tuple[Path, ...]

    @property
    def task(self) -> Task:
        """The task of the options."""
        return TASKS.find(self.options.task)

    @property
    def unit(self) -> str:
        """Plural noun of the counted items: descriptions, objects, questions or scenes."""
        return self.task.unit(self.options)

    @property
    def items(self) -> int:
        """Number of items in the annotations."""
        return self.task.count(self.jobs, self.options)

    @property
    def published(self) -> int | None:
        """Number of items in the complete annotation file; None if unknown."""
        return self.task.published.get(self.options.split)


def check_options(options: TaskOptions) -> None:
    """Raise ``ValueError`` with the option, its value and the valid ones if options are invalid or contradictory."""
    task = TASKS.find(options.task)
    if options.format not in task.formats:
        raise ValueError(f"--format is {options.format}; {task.name} has {' and '.join(task.formats)}.")
    if options.split not in task.splits and not is_validation(options.split):
        raise ValueError(
            f"--splits names {options.split!r}; {task.name} has {', '.join(task.splits)}, and val_NAME (small letters, "
            "digits and underscores) for further validation annotations."
        )
    for name, value, minimum in (
        ("rolls", options.rolls, 1),
        ("interval", options.interval, 1),
        ("step", options.step, 1),
        ("windows", options.windows, 0),
    ):
        if value < minimum:
            raise ValueError(f"--{name} is {value}; it must be at least {minimum}.")
    if options.rolls > 1 and options.frames.protocol != "vgllm":
        raise ValueError(
            f"--rolls is {options.rolls}, but frames.protocol {options.frames.protocol} gives every roll the same "
            "frames; use protocol vgllm or one roll."
        )
    if options.box_angles != "vgllm" and options.format != "vgllm":
        raise ValueError(
            f"--box_angles is {options.box_angles}, but boxes of format {options.format} have no angles; omit the "
            "option or use format vgllm."
        )
    if options.decimals not in (1, 2):
        raise ValueError(f"--decimals is {options.decimals}; it must be 1 or 2.")
    if options.decimals != 2 and options.format != "video3dllm":
        raise ValueError(
            f"--decimals is {options.decimals}, but only coordinates of format video3dllm have this option; format "
            f"{options.format} has two decimals."
        )
    options.frames.check()


def recorded_options(options: TaskOptions) -> dict[str, Any]:
    """The options that the samples depend on, as JSON values for the manifest."""
    task = TASKS.find(options.task)
    frames = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options.frames).items()}
    recorded: dict[str, Any] = {"split": options.split, "format": options.format, "frames": frames}
    if task.uses_visibility(options):
        recorded["visibility"] = options.visibility
    return {**recorded, **task.recorded_options(options)}


def make_plan(root: Path | str, options: TaskOptions) -> Plan:
    """Check the options and read the annotation files of a task.

    Raises:
        ValueError: an option is invalid (the message names it), or a file is (with its entry and field).
    """
    root = Path(root)
    check_options(options)
    files = tuple(file.path for file in input_files(root, options))
    return Plan(root, options, TASKS.find(options.task).jobs(root, options), files)


def input_files(root: Path, options: TaskOptions) -> list[InputFile]:
    """Input files of a task and split, without those of the scenes; the annotations first."""
    task = TASKS.find(options.task)
    files = [task.annotations(root, options), *task.other_files(root, options)]
    if task.needs_infos(options):
        files += [InputFile("infos", path, EMBODIEDSCAN) for path in infos_files(root, options.split)]
    if task.needs_proposals(options):
        files.append(InputFile("proposals", proposals_file(root, options.split), PROPOSALS))
    if options.frames.file is not None:
        files.append(InputFile("frames", Path(options.frames.file), "your own file, given as frames.file"))
    return files


def scene_files(root: Path, scene_id: str, options: TaskOptions) -> list[Path]:
    """Input files of a scene that the preparation reads, without those in its folder of frames."""
    parts = parts_to_read(options)
    files = [alignment_file(root, scene_id)] if SceneParts.POSES in parts else []
    return [*files, boxes_file(root, scene_id)] if SceneParts.BOXES in parts else files
