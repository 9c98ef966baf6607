"""Data and models of the demo: synthetic rooms, prepared sets, and copies of the weights that the package ships."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from w2r2_ds.config.io import DEMO_RECIPES
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TASKS, TaskOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.models.merger_io import MERGER

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
PAIRS = {"point_map": "point_map", "vggt": "vggt_pair"}
"""`demo.geometry` -> folder of a tiny pair: ``vlm/`` (Qwen2.5-VL), geometry_merger.safetensors, and card.json and
card.md, which describe it."""
VGGT = "vggt"
"""Folder of the tiny VGGT, here and beside the copy of its pair."""
CARD = "card.json"
IMAGE_SIZE = (168, 112)
"""Width and height of an image, pixels. The pair was pretrained with this size, and with the other options below."""
WORLD_FORMAT, DECIMALS = "video3dllm", 1


def prepare_scenes(config: RunConfig, workers: int = 1) -> None:
    """Write the synthetic rooms of section `demo` to `data.root`, or reuse them, and prepare the sets."""
    demo = config.demo
    written = write_dataset(
        config.data.root,
        seed=demo.seed,
        train_scenes=demo.train_scenes,
        val_scenes=demo.val_scenes,
        image_size=IMAGE_SIZE,
        frames_per_scene=demo.frames_per_scene,
        workers=workers,
        sentences="phrases",
        world_frame="corner",
        questions=("unique_color",),
    )
    logger.info(written.message)
    prepare_sets(config, workers)


def prepare_sets(config: RunConfig, workers: int = 1) -> None:
    """Prepare the sets of `data.train` and `data.val`, or reuse them.

    A set ``prepared/TASK/NAME`` belongs to TASK and has `demo.frames` frames per sample.

    Raises:
        ValueError: a path does not contain a task, or its source data are missing.
    """
    root = Path(config.data.root)
    splits = {source.path: "train" for source in config.data.train}  # path of a set -> its split
    for source in config.data.val:
        if splits.setdefault(source.path, "val") != "val":
            raise ValueError(f"data.val has {source.path}, which is in data.train too; the demo needs different paths.")
    for path, split in splits.items():
        options = _task_options(path, split, config.demo.frames)
        done = prepare(root, options, root / path, workers, quiet=True)
        if not done.reused:
            logger.info(summary_line(done.folder, done.manifest, done.reused))


def _task_options(path: str, split: Any, frames: int) -> TaskOptions:
    """Options of a set ``prepared/TASK/NAME``."""
    task = PurePosixPath(path).parent.name
    if task not in TASKS:
        raise ValueError(f"{path} has no task; the demo prepares prepared/TASK/NAME, TASK one of {', '.join(TASKS)}.")
    in_world = WORLD_FORMAT in TASKS[task].formats and "decimals" in TASKS[task].cli_options
    return TaskOptions(
        task,
        split,
        format=WORLD_FORMAT if in_world else TASKS[task].formats[0],
        frames=FrameOptions("uniform", frames),
        visibility="depth",  # rendered rooms have no meshes
        decimals=DECIMALS if in_world else 2,
        step=1,  # rendered frames are numbered 0, 1, 2, ...; extracted frames of ScanNet 0, 10, 20, ...
        windows=10,
    )


def copy_models(config: RunConfig) -> None:
    """Copy the tiny VLM, its geometry merger and the tiny VGGT to the folder of `model.vlm`, or reuse an earlier copy.

    Raises:
        ValueError: the paths of `model` are not in one folder, it has other files, or `model.geometry` is not
            `demo.geometry`.
    """
    vlm, merger = Path(config.model.vlm), Path(config.model.merger)
    if (vlm.name, merger.name) != ("vlm", MERGER) or vlm.parent != merger.parent:
        raise ValueError(
            f"demo.enabled copies tiny models to FOLDER/vlm and FOLDER/{MERGER}, but model.vlm is {vlm} and "
            f"model.merger {merger}; use --demo.enabled false for your own models."
        )
    folder, demo = vlm.parent, config.demo.geometry
    geometry, expected = config.model.geometry, str(folder / VGGT) if demo == "vggt" else ""
    if (geometry.name, geometry.path) != (demo, expected):
        raise ValueError(
            f"demo.geometry is {demo}, but model.geometry is {geometry.name} with the path {geometry.path!r}, not "
            f"{demo} with {expected!r}; use the recipe {DEMO_RECIPES[demo].name}."
        )
    pair = WEIGHTS / PAIRS[demo]
    card = pair / CARD
    if folder.exists():
        if not (folder / CARD).is_file() or (folder / CARD).read_bytes() != card.read_bytes():
            raise ValueError(f"{folder} exists, but is no copy of the demo's models; remove it or use another folder.")
        logger.info("reusing the tiny model in %s", folder)
        return
    # Copied to a temporary folder, which is renamed at the end: a folder of this name is complete.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(pair, partial)
    if demo == "vggt":
        shutil.copytree(WEIGHTS / VGGT, partial / VGGT)
    partial.rename(folder)


def prepare_demo(config: RunConfig) -> None:
    """Prepare scenes and models; existing ones are reused."""
    prepare_scenes(config)
    copy_models(config)
