"""Functions of ``w2r2 prepare``: their parameters are the options. One function prepares every task of the registry."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from w2r2_ds.commands.common import function_parser
from w2r2_ds.config.cli import Parser
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.tasks.base import TASKS, TaskOptions

TASK_OPTIONS = (
    *("format", "frames", "rolls", "visibility", "boxes", "skip_without_box"),
    *("count", "interval", "step", "windows", "train_windows", "seed"),
)
"""Parameters of `prepare_task` that only some tasks have, see `Task.cli_options`."""


def task_parser(name: str) -> Parser:
    """Parser of ``w2r2 prepare NAME`` with the options of the task and its defaults."""
    task = TASKS.find(name)
    skipped = ("task", *(option for option in TASK_OPTIONS if option not in task.cli_options))
    parser = function_parser(prepare_task, f"w2r2 prepare {name}", skipped)
    if "frames" in task.cli_options:
        parser.set_defaults({"frames.protocol": task.frame_protocol})
    return parser


def prepare_task(
    task: str,
    root: str,
    splits: list[str] = ["train", "val"],  # noqa: B006
    format: str = "",
    frames: FrameOptions = FrameOptions("uniform", 32),  # noqa: B008
    rolls: int = 0,
    visibility: Literal["embodiedscan", "depth"] = "embodiedscan",
    boxes: Literal["proposals", "annotated"] = "proposals",
    count: int = 4,
    interval: int = 3,
    step: int = 10,
    windows: int = 10,
    train_windows: int = 0,
    seed: int = 0,
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = False,
    skip_without_box: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """Prepare the samples of one task from its annotations and ScanNet's scenes.

    Args:
        task: name of a registered task.
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: annotation splits, e.g. [train,val]; ScanQA also has test_w_obj and test_wo_obj, without answers.
        format: prompt and answer format: vgllm (positions in a frame's camera) or video3dllm (positions in the world);
            the task's first one if empty.
        frames: frame selection.
        rolls: training samples per description in format vgllm, each with other frames; 0 means 2 with the frame
            protocol vgllm, as in VG-LLM, else 1.
        visibility: frames in which an object is visible: from EmbodiedScan's lists (as VG-LLM), or the depth images.
        boxes: validation: box whose centre is in the prompt: the proposal with the largest IoU, or the annotated one.
        count: frames per sample.
        interval: a sample has every interval-th frame of a run of neighbouring frames.
        step: difference of the numbers of neighbouring frames; 10 if every tenth image was extracted.
        windows: samples per scene in validation, drawn at random; 0 for all.
        train_windows: samples per scene in training, drawn at random; 0 for all.
        seed: random seed of the draw.
        out: folder of the folders of the splits; ROOT/prepared/TASK if empty.
        workers: processes; 0 means one per available core.
        skip_broken_scenes: skip and list scenes with missing or malformed files, instead of an error.
        skip_without_box: skip and list annotations about objects without a box, instead of an error.
        check: only list missing files and their sources; exit status 1 if there are any.
        dry_run: only print the number of samples and the size.
    """
    from w2r2_ds.data.prepare.manifest import summary
    from w2r2_ds.data.prepare.pipeline import prepare
    from w2r2_ds.data.prepare.plan import make_plan
    from w2r2_ds.data.prepare.preflight import forecast, missing, report
    from w2r2_ds.utils.sanitize import lines

    if not splits:
        raise ValueError("--splits is empty; name at least one.")
    found_task = TASKS.find(task)
    chosen = format or found_task.formats[0]
    if rolls and chosen != "vgllm":
        raise ValueError(f"--rolls is {rolls}, but only format vgllm has rolls; omit the option.")
    if "frames" not in found_task.cli_options:  # the task chooses its frames itself, see Detection
        frames = FrameOptions("uniform", count, seed)
    folder, complete = Path(out or Path(root) / "prepared" / task), True
    for split in dict.fromkeys(splits):
        options = TaskOptions(
            task,
            split,
            chosen,
            frames,
            rolls=rolls,
            visibility=visibility,
            boxes=boxes,
            interval=interval,
            step=step,
            windows=train_windows if split == "train" else windows,
        )
        options = replace(options, rolls=rolls or found_task.default_rolls(options))
        if check:
            found = missing(root, options)
            print(lines(report(root, options, found)), flush=True)
            complete = complete and not found
        elif dry_run:
            print(forecast(make_plan(root, options), folder / split), flush=True)
        else:
            done = prepare(root, options, folder / split, _processes(workers), skip_broken_scenes, skip_without_box)
            print(lines(summary(done.folder, done.manifest, done.reused)), flush=True)
    return 0 if complete else 1


def _processes(workers: int) -> int:
    if workers < 0:
        raise ValueError(f"--workers is {workers}; it cannot be negative.")
    return workers or len(os.sched_getaffinity(0))


def boxes(root: str, scenes: list[str] = [], workers: int = 0, overwrite: bool = False) -> None:  # noqa: B006
    """ScanRefer's boxes, scannet_data/SCENE_aligned_bbox.npy, from ScanNet's meshes and their annotations.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        scenes: names of scenes; all below ROOT/scans if empty.
        workers: processes; 0 means one per available core.
        overwrite: replace existing files.
    """
    from w2r2_ds.data.prepare.scannet_boxes import write_all_boxes

    written, existing = write_all_boxes(root, scenes, _processes(workers), overwrite)
    print(f"{Path(root) / 'scannet_data'}: boxes of {written} scenes written, {existing} existed")


def synthetic(
    out: str,
    seed: int = 0,
    train_scenes: int = 48,
    val_scenes: int = 12,
    image_size: tuple[int, int] = (320, 240),
    frames_per_scene: int = 24,
    workers: int = 0,
) -> None:
    """Furnished rooms with referring sentences, in ScanNet's and ScanRefer's layout.

    A complete data set with the same options is reused; one with other options is never overwritten.
    OUT/contact_sheets/ shows each scene with its described objects.

    Args:
        out: folder to write, e.g. runs/demo/scenes.
        seed: the same seed and options give the same bytes.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms; none is a training room.
        image_size: width and height of the images in pixels, e.g. [320,240].
        frames_per_scene: posed images per room.
        workers: processes; 0 means one per available core.
    """
    from w2r2_ds.demo.synthetic.write import write_dataset

    print(write_dataset(out, seed, train_scenes, val_scenes, image_size, frames_per_scene, _processes(workers)).message)


def demo(workers: int = 0) -> None:
    """Data and models of the demo recipe: prepared synthetic scenes, a tiny pretrained VLM and a tiny VGGT.

    Args:
        workers: processes for the scenes; 0 means one per available core.
    """
    from w2r2_ds.config.io import load_config
    from w2r2_ds.demo.assets import prepare_models, prepare_scenes

    config = load_config()
    prepare_scenes(config, _processes(workers))
    prepare_models(config)
