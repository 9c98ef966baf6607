"""The preparations of `w2r2 prepare`, each a function whose parameters are its options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from w2r2_ds.data.frames.selection import FrameOptions

if TYPE_CHECKING:
    from w2r2_ds.data.tasks.base import TaskOptions

Splits = list[Literal["train", "val"]]
QaSplits = list[Literal["train", "val", "test_w_obj", "test_wo_obj"]]


def scanrefer(
    root: str,
    splits: Splits = ["train", "val"],  # noqa: B006
    format: Literal["vgllm", "video3dllm"] = "vgllm",
    frames: FrameOptions = FrameOptions("vgllm", 32),  # noqa: B008
    rolls: int = 0,
    visibility: Literal["embodiedscan", "depth"] = "embodiedscan",
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = False,
    skip_without_box: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """A sentence about an object -> where the object is.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: of the annotations.
        format: VG-LLM's frame and box in its camera, or the corners of the world box in Video-3D-LLM's words.
        frames: which frames a sample sees.
        rolls: training samples per description in VG-LLM's format, each with frames of its own; 0 means 2, as VG-LLM,
            where the protocol draws frames for every sample (vgllm), else 1.
        visibility: which frames see an object: by EmbodiedScan's lists (as VG-LLM), or by the depth images.
        out: folder for a folder per split; ROOT/prepared/scanrefer without it.
        workers: processes; 0 means one per available core.
        skip_broken_scenes: skip and report scenes with missing or broken files, instead of stopping with an error.
        skip_without_box: skip and report items about objects without a box, instead of stopping with an error.
        check: only list what is missing and where it comes from; exit status 1 if something is.
        dry_run: only print what would be written.
    """
    drawn = frames.protocol == "vgllm" and format == "vgllm"

    from w2r2_ds.data.tasks.base import TaskOptions

    def options(split: Any) -> TaskOptions:
        each = rolls or (2 if drawn and split == "train" else 1)
        return TaskOptions("scanrefer", split, format, frames, rolls=each, visibility=visibility)

    if rolls and format != "vgllm":
        raise ValueError(f"--rolls is {rolls}, but only format vgllm has rolls; leave it out.")
    skip = {"skip_broken_scenes": skip_broken_scenes, "skip_without_box": skip_without_box}
    return _run("scanrefer", root, splits, options, out, workers, check, dry_run, skip)


def scan2cap(
    root: str,
    splits: Splits = ["train", "val"],  # noqa: B006
    format: Literal["vgllm", "video3dllm"] = "vgllm",
    frames: FrameOptions = FrameOptions("vgllm", 32),  # noqa: B008
    boxes: Literal["proposals", "annotated"] = "proposals",
    visibility: Literal["embodiedscan", "depth"] = "embodiedscan",
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = False,
    skip_without_box: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """An object given by its place -> a sentence about it.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: of the annotations, which are ScanRefer's.
        format: the place in the first frame's camera (VG-LLM), or in the world (Video-3D-LLM's words).
        frames: which frames a sample sees.
        boxes: in validation, which box the place is the centre of: the best of the proposals, or the annotated one.
        visibility: for the training protocol scene_sets, which frames see an object, as for scanrefer.
        out: folder for a folder per split; ROOT/prepared/scan2cap without it.
        workers: processes; 0 means one per available core.
        skip_broken_scenes: skip and report scenes with missing or broken files, instead of stopping with an error.
        skip_without_box: skip and report items about objects without a box, instead of stopping with an error.
        check: only list what is missing and where it comes from; exit status 1 if something is.
        dry_run: only print what would be written.
    """

    from w2r2_ds.data.tasks.base import TaskOptions

    def options(split: Any) -> TaskOptions:
        return TaskOptions("scan2cap", split, format, frames, boxes=boxes, visibility=visibility)

    skip = {"skip_broken_scenes": skip_broken_scenes, "skip_without_box": skip_without_box}
    return _run("scan2cap", root, splits, options, out, workers, check, dry_run, skip)


def scanqa(
    root: str,
    splits: QaSplits = ["train", "val"],  # noqa: B006
    frames: FrameOptions = FrameOptions("uniform", 32),  # noqa: B008
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = False,
    skip_without_box: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """A question about a scene -> a short answer, in Video-3D-LLM's words.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: of the annotations; the test splits have no answers and cannot be scored here.
        frames: which frames a sample sees.
        out: folder for a folder per split; ROOT/prepared/scanqa without it.
        workers: processes; 0 means one per available core.
        skip_broken_scenes: skip and report scenes with missing or broken files, instead of stopping with an error.
        skip_without_box: skip and report items about objects without a box, instead of stopping with an error.
        check: only list what is missing and where it comes from; exit status 1 if something is.
        dry_run: only print what would be written.
    """

    from w2r2_ds.data.tasks.base import TaskOptions

    def options(split: Any) -> TaskOptions:
        return TaskOptions("scanqa", split, "video3dllm", frames)

    skip = {"skip_broken_scenes": skip_broken_scenes, "skip_without_box": skip_without_box}
    return _run("scanqa", root, splits, options, out, workers, check, dry_run, skip)


def detection(
    root: str,
    splits: Splits = ["train", "val"],  # noqa: B006
    count: int = 4,
    interval: int = 3,
    step: int = 10,
    windows: int = 10,
    train_windows: int = 0,
    seed: int = 0,
    out: str = "",
    workers: int = 0,
    skip_broken_scenes: bool = False,
    check: bool = False,
    dry_run: bool = False,
) -> int:
    """A few neighbouring frames -> every object that they see, from EmbodiedScan, as VG-LLM.

    Args:
        root: data root in ScanNet's layout (docs/guides/own-dataset.md).
        splits: of EmbodiedScan.
        count: frames per sample.
        interval: every how many frames of a run without a gap a sample takes one.
        step: how far apart the numbers of neighbouring frames are; 10 where every tenth image was extracted.
        windows: samples per scene in validation, drawn; 0 for all.
        train_windows: the same for training.
        seed: of the draw.
        out: folder for a folder per split; ROOT/prepared/detection without it.
        workers: processes; 0 means one per available core.
        skip_broken_scenes: skip and report scenes with missing or broken files, instead of stopping with an error.
        check: only list what is missing and where it comes from; exit status 1 if something is.
        dry_run: only print what would be written.
    """

    from w2r2_ds.data.tasks.base import TaskOptions

    def options(split: Any) -> TaskOptions:
        most = train_windows if split == "train" else windows
        frames = FrameOptions("uniform", count, seed)
        return TaskOptions("detection", split, "vgllm", frames, interval=interval, step=step, windows=most)

    return _run(
        "detection", root, splits, options, out, workers, check, dry_run, {"skip_broken_scenes": skip_broken_scenes}
    )


def _run(
    task: str,
    root: str,
    splits: Sequence[str],
    options: Callable[[str], TaskOptions],
    out: str,
    workers: int,
    check: bool,
    dry_run: bool,
    skip: Mapping[str, bool],
) -> int:
    """Check, forecast or prepare every split; returns the exit status. `skip`: which items may be skipped."""
    from w2r2_ds.data.prepare.manifest import summary
    from w2r2_ds.data.prepare.pipeline import prepare
    from w2r2_ds.data.prepare.plan import make_plan
    from w2r2_ds.data.prepare.preflight import forecast, missing, report
    from w2r2_ds.utils.sanitize import lines

    if not splits:
        raise ValueError("--splits is empty; name at least one.")
    folder, complete = Path(out or Path(root) / "prepared" / task), True
    for split in dict.fromkeys(splits):
        if check:
            found = missing(root, options(split))
            print(lines(report(root, options(split), found)), flush=True)
            complete = complete and not found
        elif dry_run:
            print(forecast(make_plan(root, options(split)), folder / split), flush=True)
        else:
            done = prepare(root, options(split), folder / split, _processes(workers), **skip)
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
        scenes: names; without any, every scene below ROOT/scans.
        workers: processes; 0 means one per available core.
        overwrite: make them again where they are.
    """
    from w2r2_ds.data.prepare.scannet_boxes import write_all_boxes

    made, kept = write_all_boxes(root, scenes, _processes(workers), overwrite)
    print(f"{Path(root) / 'scannet_data'}: boxes of {made} scenes made, {kept} were there")


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
    """What the demo recipe needs: its synthetic scenes, prepared, a tiny warmed-up VLM and a tiny VGGT.

    Args:
        workers: processes for the scenes; 0 means one per available core.
    """
    from w2r2_ds.config.io import load_config
    from w2r2_ds.demo.assets import prepare_models, prepare_scenes

    config = load_config()
    prepare_scenes(config, _processes(workers))
    prepare_models(config)
