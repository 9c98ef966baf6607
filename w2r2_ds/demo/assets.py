"""Data and models of the demo: synthetic scenes, a tiny VLM trained for a few steps, and a tiny random VGGT."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.manifest import summary_line
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TASKS, TaskOptions
from w2r2_ds.demo.pretrain import warm_up
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.demo.tiny_models import build_tiny_vggt, build_tiny_vlm
from w2r2_ds.models.build import load_frontend
from w2r2_ds.models.weights.loading import load_vlm

logger = logging.getLogger(__name__)

MANIFEST = "demo.json"
"""File in the tiny VLM's directory with the options that it was made with."""


def prepare_scenes(config: RunConfig, workers: int = 1) -> None:
    """Write the synthetic scenes of section `demo` to `data.root`, or reuse them."""
    demo = config.demo
    written = write_dataset(
        config.data.root,
        seed=demo.seed,
        train_scenes=demo.train_scenes,
        val_scenes=demo.val_scenes,
        frames_per_scene=demo.frames_per_scene,
        workers=workers,
    )
    logger.info(written.message)
    prepare_sets(config)


def prepare_sets(config: RunConfig) -> None:
    """Prepare the sets of `data.train` and `data.val`, or reuse them.

    A set ``prepared/TASK/NAME`` belongs to TASK and has `demo.frames` frames per sample. Object visibility is computed
    from depth images, because rendered scenes have no meshes.

    Raises:
        ValueError: a path does not contain a task, or its source data are missing.
    """
    root = Path(config.data.root)
    splits = {source.path: "train" for source in config.data.train}  # path of a set -> its split
    for source in config.data.val:
        if splits.setdefault(source.path, "val") != "val":
            raise ValueError(f"data.val has {source.path}, which is in data.train too; the demo needs different paths.")
    for path, split in splits.items():
        done = prepare(root, _task_options(path, split, config.demo.frames), root / path, quiet=True)
        if not done.reused:
            logger.info(summary_line(done.folder, done.manifest, done.reused))


def _task_options(path: str, split: Any, frames: int) -> TaskOptions:
    """Options of a set ``prepared/TASK/NAME``."""
    task = PurePosixPath(path).parent.name
    if task not in TASKS:
        raise ValueError(f"{path} has no task; the demo prepares prepared/TASK/NAME, TASK one of {', '.join(TASKS)}.")
    return TaskOptions(
        task,
        split,
        format=TASKS[task].formats[0],
        frames=FrameOptions("uniform", frames),
        visibility="depth",
        step=1,  # rendered frames are numbered 0, 1, 2, ...; extracted frames of ScanNet 0, 10, 20, ...
        windows=10,
    )


def prepare_models(config: RunConfig) -> None:
    """Build the tiny VGGT and VLM and pretrain the VLM for `demo.warmup_steps`, or reuse models of the same options.

    Raises:
        ValueError: the directories exist and were made with other options, or not by the demo.
    """
    vlm, vggt = Path(config.model.vlm), Path(config.model.geometry.path)
    options = json.loads(json.dumps({"data": asdict(config.data), "demo": asdict(config.demo)}))  # as read from JSON
    # Only these data options change the pretrained VLM.
    options["data"] = {name: options["data"][name] for name in ("root", "train", "frame_width", "frame_fit", "visual")}
    if (vlm.name, vggt.name) != ("vlm", "vggt") or vlm.parent != vggt.parent:
        raise ValueError(
            f"demo.enabled builds tiny models in FOLDER/vlm and FOLDER/vggt, but model.vlm is {vlm} and "
            f"model.geometry.path {vggt}; use --demo.enabled false for your own models."
        )
    if vlm.exists() or vggt.exists():
        manifest = vlm / MANIFEST
        if not manifest.is_file() or json.loads(manifest.read_text()) != options:
            raise ValueError(
                f"{vlm} exists but was not made with these data and demo options; remove it or use another folder."
            )
        logger.info("reusing the tiny model in %s", vlm)
        return
    # Build both models in temporary directories and rename them at the end, the VLM with the manifest last.
    partial = vlm.with_name(vlm.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    samples = load_mixture(config.data, "train")
    build_tiny_vlm(partial, [f"{sample.question}\n{sample.answer}" for sample in samples], config.demo.seed)
    partial_vggt = build_tiny_vggt(partial.with_name("vggt.partial"), config.demo.seed)
    model = load_vlm(str(partial), torch.float32, "sdpa")
    geometry = replace(config.model.geometry, path=str(partial_vggt))
    frontend = load_frontend(replace(config.model, vlm=str(partial), geometry=geometry))
    every = max(1, config.demo.warmup_steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            logger.info("warm-up step %d/%d: loss %.3f", step, config.demo.warmup_steps, loss)

    warm_up(model, frontend, samples, config, report)
    model.save_pretrained(partial)
    (partial / MANIFEST).write_text(json.dumps(options, indent=2) + "\n")
    os.replace(partial_vggt, vggt)
    os.replace(partial, vlm)


def prepare_demo(config: RunConfig) -> None:
    """Prepare scenes and models; existing ones are reused."""
    prepare_scenes(config)
    prepare_models(config)
