"""Functions of ``w2r2 prepare``; their parameters are the options. `prepare_task` serves every registered task."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from w2r2_ds.commands.common import DemoOptions, function_parser
from w2r2_ds.config.cli import Parser
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.tasks.base import TASKS, TaskOptions

TASK_OPTIONS = (
    *("format", "frames", "rolls", "visibility", "boxes", "box_angles", "decimals", "skip_without_box"),
    *("count", "interval", "step", "windows", "train_windows", "seed"),
)
"""Parameters of `prepare_task` that are options of some tasks only, see `Task.cli_options`."""


def task_parser(name: str) -> Parser:
    """Build the parser of ``w2r2 prepare NAME`` with the task's options and defaults."""
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
    box_angles: Literal["vgllm", "nearest_heading"] = "vgllm",
    decimals: int = 2,
    count: int = 4,
    interval: int = 3,
    step: int = 10,
    windows: int = 10,
    train_windows: int = 0,
    seed: int = 0,
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = True,
    skip_without_box: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """Prepare the samples of one task from its annotations and ScanNet's scenes.

    Args:
        task: name of a registered task.
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: annotation splits, e.g. [train,val]; val_NAME is a further validation split; test splits have no answer:
            test (ScanRefer, Scan2Cap), test_w_obj and test_wo_obj (ScanQA).
        format: prompt and answer format: vgllm (coordinates in a frame's camera) or video3dllm (world coordinates);
            default: the task's first format.
        frames: frame selection.
        rolls: number of training samples per description in format vgllm, each with other frames; 0 means 2 with the
            frame protocol vgllm, as in VG-LLM, else 1.
        visibility: source of object visibility: EmbodiedScan's lists (as in VG-LLM), or the depth images.
        boxes: box whose centre is in a validation prompt: the proposal with the largest IoU, or the annotated box.
        box_angles: description of an answer's box in format vgllm. A quarter turn about the vertical, with two sizes
            exchanged, gives the same box: nearest_heading takes the turn that is nearest to the camera's heading,
            vgllm does not turn it, as VG-LLM.
        decimals: digits after the decimal point of coordinates in format video3dllm, 1 or 2.
        count: number of frames per sample.
        interval: a sample has every interval-th frame of a sequence of neighbouring frames.
        step: difference between the numbers of neighbouring frames; 10 if every tenth image was extracted.
        windows: maximum number of validation samples per scene, drawn at random; 0 for all.
        train_windows: maximum number of training samples per scene, drawn at random; 0 for all.
        seed: random seed of the draw.
        out: parent of the splits' folders; default: ROOT/prepared/TASK.
        workers: number of processes; 0 means one per available core.
        skip_broken_scenes: skip, count and list scenes with missing or malformed files; false: they are an error.
        skip_without_box: skip and list annotations of objects without a box instead of raising an error.
        check: only read all input files as the preparation does, and print every kind of problem; the exit code is 1 if
            there are any.
        dry_run: as check, and print the number of samples and their size on disk.
    """
    from w2r2_ds.data.prepare.manifest import summary_line
    from w2r2_ds.data.prepare.pipeline import prepare
    from w2r2_ds.data.prepare.trial import try_preparation
    from w2r2_ds.utils.sanitize import lines

    if not splits:
        raise ValueError("--splits is empty; pass at least one split.")
    registered = TASKS.find(task)
    chosen_format = format or registered.formats[0]
    if rolls and chosen_format != "vgllm":
        raise ValueError(f"--rolls is {rolls}, but only format vgllm has rolls; omit the option.")
    if "frames" not in registered.cli_options:  # e.g. `Detection`, which has --count, --interval and --step
        frames = FrameOptions("uniform", count, seed)
    folder, complete = Path(out or Path(root) / "prepared" / task), True
    for split in dict.fromkeys(splits):
        options = TaskOptions(
            task,
            split,
            chosen_format,
            frames,
            rolls=rolls,
            visibility=visibility,
            boxes=boxes,
            box_angles=box_angles,
            decimals=decimals,
            interval=interval,
            step=step,
            windows=train_windows if split == "train" else windows,
        )
        options = replace(options, rolls=rolls or registered.default_rolls(options))
        if check or dry_run:
            trial = try_preparation(root, options, _processes(workers), skip_broken_scenes, skip_without_box)
            if check or trial.problems:
                print(lines(trial.report()), flush=True)
            if dry_run:
                print(lines(trial.forecast(folder / split)), flush=True)
            complete = complete and not trial.problems
        else:
            done = prepare(root, options, folder / split, _processes(workers), skip_broken_scenes, skip_without_box)
            print(lines(summary_line(done.folder, done.manifest, done.reused)), flush=True)
    return 0 if complete else 1


def _processes(workers: int) -> int:
    """Number of processes for the option ``--workers``."""
    if workers < 0:
        raise ValueError(f"--workers is {workers}; it cannot be negative.")
    return workers or len(os.sched_getaffinity(0))


def boxes(root: str, scenes: list[str] = [], workers: int = 0, overwrite: bool = False) -> None:  # noqa: B006
    """Compute ScanRefer's boxes, scannet_data/SCENE_aligned_bbox.npy, from ScanNet's meshes and their annotations.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        scenes: names of scenes; default: all below ROOT/scans.
        workers: number of processes; 0 means one per available core.
        overwrite: replace existing files.
    """
    from w2r2_ds.data.prepare.scannet_boxes import write_all_boxes
    from w2r2_ds.utils.findings import by_kind
    from w2r2_ds.utils.sanitize import lines

    done = write_all_boxes(root, scenes, _processes(workers), overwrite)
    summary = (
        f"{Path(root) / 'scannet_data'}: wrote the boxes of {done.written} scenes; {done.existing} already existed"
    )
    print(lines("\n  ".join([summary, *by_kind(done.findings)])))


def synthetic(
    out: str,
    seed: int = 0,
    train_scenes: int = 48,
    val_scenes: int = 12,
    image_size: tuple[int, int] = (320, 240),
    frames_per_scene: int = 24,
    objects: float = 1.0,
    sentences: Literal["relations", "phrases"] = "relations",
    world_frame: Literal["center", "corner"] = "center",
    questions: list[str] = [],  # noqa: B006
    shift: list[str] = [],  # noqa: B006
    furniture_factor: float = 1.5,
    focal_factor: float = 1.4,
    room_factor: float = 0.7,
    camera_drop: float = 0.5,
    camera_flatter: float = 10.0,
    prior: Literal["color", "class"] = "color",
    prior_strength: float = 0.9,
    workers: int = 0,
) -> None:
    """Generate furnished rooms with referring sentences, in the file layout of ScanNet and ScanRefer.

    A complete data set with the same options is reused; a data set with other options is never overwritten.
    OUT/contact_sheets/ shows each scene with its described objects. With --shift, further validation splits have the
    same rooms and sentences with another geometry (docs/research/shortcut-benchmark.md).

    Args:
        out: folder to write, e.g. runs/demo/scenes.
        seed: random seed; the same seed and options give the same bytes.
        train_scenes: number of training rooms.
        val_scenes: number of validation rooms; none is a training room.
        image_size: width and height of the images in pixels, e.g. [320,240].
        frames_per_scene: number of posed images per room.
        objects: factor on the number of objects of every class in all rooms; more objects, harder references.
        sentences: relations describes an object by its relation to others ("the chair nearest to the red sofa.");
            phrases by its colour and class, where no other object has both ("the red chair."), or by its class.
        world_frame: center puts the origin into the middle of the room; corner into its lowest corner, with +y the
            nearest quarter turn to the heading of the first frame's camera, so that all coordinates are 0 or more.
        questions: kinds of questions for ScanQA's annotations: color, count, nearest, between, larger, side, where;
            default: all of these. unique_color is color for the only object of a class.
        shift: shifts, each a split val_NAME: furniture_scale, focal_length, room_scale, camera, position_prior; e.g.
            [room_scale,camera]. position_prior must be alone, because it changes the training rooms.
        furniture_factor: furniture_scale; every object is scaled by a factor between this and its square root, or their
            inverses.
        focal_factor: focal_length; factor on the focal length.
        room_factor: room_scale; factor on all lengths of a room.
        camera_drop: camera; distance in metres by which cameras are lowered.
        camera_flatter: camera; angle in degrees by which cameras are turned up.
        prior: position_prior; attribute of an object on which its side of the room depends.
        prior_strength: position_prior; share of the objects on the side of their attribute; 0.5 plants nothing.
        workers: number of processes; 0 means one per available core.
    """
    from w2r2_ds.demo.synthetic.options import QUESTION_KINDS, ShiftOptions
    from w2r2_ds.demo.synthetic.write import write_dataset

    shifts = ShiftOptions(
        tuple(shift), furniture_factor, focal_factor, room_factor, camera_drop, camera_flatter, prior, prior_strength
    )
    written = write_dataset(
        out,
        seed,
        train_scenes,
        val_scenes,
        image_size,
        frames_per_scene,
        _processes(workers),
        objects,
        shifts,
        sentences,
        world_frame,
        questions or QUESTION_KINDS,
    )
    print(written.message)


def demo(workers: int = 0, demo: DemoOptions = DemoOptions()) -> None:  # noqa: B008
    """Make the data and models of the demo recipe: prepared synthetic scenes, and a copy of the tiny pretrained model.

    Args:
        workers: number of processes; 0 means one per available core.
        demo: options of the demo.
    """
    from w2r2_ds.config.io import load_config
    from w2r2_ds.demo.assets import copy_models, prepare_scenes

    config = load_config(overrides=["--demo.geometry", demo.geometry])
    prepare_scenes(config, _processes(workers))
    copy_models(config)
