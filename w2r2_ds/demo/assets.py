"""What the demo makes where a user would bring data and weights: scenes, a tiny warmed-up VLM, a tiny VGGT."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.loader import load_mixture
from w2r2_ds.data.prepare.manifest import summary
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TASKS, TaskOptions
from w2r2_ds.demo.pretrain import warm_up
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.demo.tiny_models import build_tiny_vggt, build_tiny_vlm
from w2r2_ds.models.build import load_frontend
from w2r2_ds.models.loading import load_vlm

MANIFEST = "demo.json"


def prepare_scenes(config: RunConfig, workers: int = 1) -> None:
    """Write the synthetic scenes of `demo.*` to `data.root`, or reuse them."""
    demo = config.demo
    written = write_dataset(
        config.data.root,
        seed=demo.seed,
        train_scenes=demo.train_scenes,
        val_scenes=demo.val_scenes,
        frames_per_scene=demo.frames_per_scene,
        workers=workers,
    )
    print(written.message, flush=True)
    prepare_sets(config)


def prepare_sets(config: RunConfig) -> None:
    """Prepare what `data.train` and `data.val` name, or reuse it: ``prepared/TASK/NAME``, with `demo.frames` frames.

    Depth images say which frames see an object, so that nothing is needed that a rendered scene does not have.

    Raises:
        ValueError: a path names no task, or data that are not there.
    """
    root = Path(config.data.root)
    wanted = {source.path: "train" for source in config.data.train}
    for source in config.data.val:
        if wanted.setdefault(source.path, "val") != "val":
            raise ValueError(f"data.val names {source.path}, which data.train names too; the demo's splits differ.")
    for path, split in wanted.items():
        done = prepare(root, _task_options(path, split, config.demo.frames), root / path, quiet=True)
        if not done.reused:
            print(summary(done.folder, done.manifest, done.reused), flush=True)


def _task_options(path: str, split: Any, frames: int) -> TaskOptions:
    task = PurePosixPath(path).parent.name
    if task not in TASKS:
        raise ValueError(f"{path} names no task; the demo prepares prepared/TASK/NAME, TASK one of {', '.join(TASKS)}.")
    return TaskOptions(
        task,
        split,
        format=TASKS[task].formats[0],
        frames=FrameOptions("uniform", frames),
        visibility="depth",
        step=1,  # every rendered frame is written
        windows=10,
    )


def prepare_models(config: RunConfig) -> None:
    """Build tiny VGGT and VLM and warm the VLM up, or reuse what the same options made before.

    Raises:
        ValueError: `model.vlm` exists and was made with other options, or by someone else.
    """
    vlm, vggt = Path(config.model.vlm), Path(config.model.geometry.path)
    options = json.loads(json.dumps({"data": asdict(config.data), "demo": asdict(config.demo)}))
    # What the warm-up does not depend on may change.
    options["data"] = {name: options["data"][name] for name in ("root", "train", "frame_width", "visual")}
    if (vlm.name, vggt.name) != ("vlm", "vggt") or vlm.parent != vggt.parent:
        raise ValueError(
            f"demo.enabled makes tiny models FOLDER/vlm and FOLDER/vggt, but model.vlm is {vlm} and "
            f"model.geometry.path {vggt}; "
            "give --demo.enabled false to use models of your own."
        )
    if vlm.exists() or vggt.exists():
        manifest = vlm / MANIFEST
        if not manifest.is_file() or json.loads(manifest.read_text()) != options:
            raise ValueError(
                f"{vlm} exists but was not made with these data and demo options; remove it or name another."
            )
        print(f"reusing the tiny model in {vlm}", flush=True)
        return
    aside = vlm.with_name(vlm.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    samples = load_mixture(config.data, "train")
    build_tiny_vlm(aside, [f"{sample.question}\n{sample.answer}" for sample in samples], config.demo.seed)
    build_tiny_vggt(aside.with_name("vggt.partial"), config.demo.seed)
    model = load_vlm(str(aside), torch.float32, "sdpa")
    frontend = load_frontend(replace(config.model, vlm=str(aside)))
    every = max(1, config.demo.warmup_steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            print(f"warm-up step {step}/{config.demo.warmup_steps}: loss {loss:.3f}", flush=True)

    warm_up(model, frontend, samples, config, report)
    model.save_pretrained(aside)
    (aside / MANIFEST).write_text(json.dumps(options, indent=2) + "\n")
    os.replace(aside.with_name("vggt.partial"), vggt)
    os.replace(aside, vlm)


def prepare_demo(config: RunConfig) -> None:
    """Scenes and models; what is there already is reused."""
    prepare_scenes(config)
    prepare_models(config)
