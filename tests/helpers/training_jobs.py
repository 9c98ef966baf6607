"""Jobs (short training runs) of tests/training/test_trainer.py, some with invalid input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from damaged_files import flip_bit
from runs import SAVE_EVERY, STEPS, ZERO3, Job, World
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.training.checkpoint.manifest import read_manifest, write_manifest
from w2r2_ds.utils.files import atomic_io

FEW = 6
DROPOUT: dict[str, object] = {"model__lora_dropout": 0.1, "train__steps": 4, "train__save_every": 2}
DECODE_GAP: dict[str, object] = {"objective__decode_gap_every": 1, "objective__decode_gap_samples": 2}
AUTO: dict[str, object] = {"resume": "auto"}
STAGES = ("zero2", "zero3_offload")
"""Names of further files of ds_configs/."""

RESHARDED = {"apart-zero3": ZERO3, "apart-zero2": ZERO3.with_name("zero2.json")}
APART: dict[str, object] = {"train__steps": FEW, "train__save_every": 3, "train__merger_lr": 3e-4}
"""Learning rates so different that swapped parameter groups change the losses."""
NO_DRY_RUN: dict[str, Any] = {"dry_run": False}
"""Skips the dry run to save time; `test_the_dry_run_does_not_change_the_losses` tests it."""
EVERY: dict[str, object] = {"train__steps": 3, "train__save_every": 1, "train__keep_last": 9}


def arguments(world: World, out: Path, ds: Path = ZERO3, **changes: object) -> list[str]:
    """Command line of launchers/train.py."""
    return ["--deepspeed", str(ds), *world.arguments(out, **changes)]


def on_one_rank(world: World, trained: Path, folder: Path) -> list[Job]:
    """Jobs for one rank; some resume runs of `on_two_ranks`."""
    contradiction = folder / "contradiction.json"
    contradiction.write_text(json.dumps(json.loads(ZERO3.read_text()) | {"train_micro_batch_size_per_gpu": 2}))
    d, back = folder / "dropout", folder / "dropout-resumed"
    resumed, untouched = folder / "resumed", folder / "untouched"
    shutil.copytree(trained, untouched)
    shutil.copytree(trained, resumed)
    flip_optimizer_bit(resumed / "checkpoints" / f"step-{STEPS:06d}" / "engine")
    malicious = with_malicious_shard(trained, folder / "malicious")
    jobs = [
        Job("resumed", arguments(world, resumed, **AUTO)),
        Job("malicious", arguments(world, malicious, **AUTO)),
        Job("dropout", arguments(world, d, **DROPOUT)),
        Job("dropout-resumed", arguments(world, back, **DROPOUT, **AUTO), rewind=(str(d), str(back), 2)),
        Job("no-dry-run", arguments(world, folder / "no-dry-run", **DROPOUT), stop_after=2, **NO_DRY_RUN),
        Job("token", arguments(world, folder / "token1", objective__reduction="token"), stop_after=3, **NO_DRY_RUN),
        Job("decode_gap", arguments(world, folder / "decode_gap", **DROPOUT, **DECODE_GAP), stop_after=2),
        Job("mask", arguments(world, folder / "mask1", objective__visual_mask_ratio=0.5), stop_after=3, **NO_DRY_RUN),
        Job("silent", arguments(world, folder / "silent", train__steps=1, objective__mu=0.99), **NO_DRY_RUN),
        Job(
            "rates",
            arguments(world, folder / "rates", train__steps=2, train__merger_lr=3e-4),
            stop_after=1,
            **NO_DRY_RUN,
        ),
        Job("misspelt", arguments(world, folder / "misspelt", objective__push_term="marign")),
        Job("again", arguments(world, untouched)),
        Job("other-rank", arguments(world, untouched, model__lora_rank=4, **AUTO)),
        Job("contradiction", arguments(world, folder / "none", contradiction)),
    ]
    for name in STAGES:
        ds = ZERO3.with_name(f"{name}.json")
        jobs.append(Job(name, arguments(world, folder / name, ds, train__save_every=3), stop_after=3))
    for name, ds in RESHARDED.items():
        one = folder / f"{name}-on-one"
        rewound = (str(folder / name), str(one), 3)
        jobs.append(Job(one.name, arguments(world, one, ds, **APART, **AUTO), rewind=rewound, **NO_DRY_RUN))
    return jobs


def on_two_ranks(world: World, trained: Path, folder: Path) -> list[Job]:
    """Jobs for two ranks."""
    grown = folder / "two-from-one"
    d, back = folder / "dropout2", folder / "dropout2-resumed"
    other_log = folder / "other-log"
    other_log.mkdir()
    (other_log / "metrics.jsonl").write_text("hello\n")
    return [
        Job("two", arguments(world, folder / "two"), stop_after=FEW),
        Job("two-micro2", arguments(world, folder / "two-micro2", train__micro_batch=2), stop_after=FEW, **NO_DRY_RUN),
        Job("token", arguments(world, folder / "token2", objective__reduction="token"), stop_after=3, **NO_DRY_RUN),
        Job("mask", arguments(world, folder / "mask2", objective__visual_mask_ratio=0.5), stop_after=3, **NO_DRY_RUN),
        Job("nan", arguments(world, folder / "nan", train__save_every=1), nan_call=2, **NO_DRY_RUN),
        Job(
            "nan-gradient",
            arguments(world, folder / "nan-gradient", train__save_every=1),
            nan_call=2,
            nan_gradient=True,
            **NO_DRY_RUN,
        ),
        Job(
            "two-from-one",
            arguments(world, grown, **AUTO),
            rewind=(str(trained), str(grown), STEPS - SAVE_EVERY),
            **NO_DRY_RUN,
        ),
        *(Job(name, arguments(world, folder / name, ds, **APART), **NO_DRY_RUN) for name, ds in RESHARDED.items()),
        Job("full", arguments(world, folder / "full", **EVERY), save_fault=("full", 2), **NO_DRY_RUN),
        Job("taken-over", arguments(world, folder / "taken-over", **EVERY), save_fault=("taken over", 2), **NO_DRY_RUN),
        Job("dropout", arguments(world, d, **DROPOUT)),
        Job("dropout-resumed", arguments(world, back, **DROPOUT, **AUTO), rewind=(str(d), str(back), 2), **NO_DRY_RUN),
        Job("cut-frame", arguments(world, folder / "cut", data__root=cut_frame_root(world, folder))),
        Job("other-log", arguments(world, other_log)),
        Job("long", arguments(world, folder / "long", data__max_length=100)),
    ]


def cut_frame_root(world: World, folder: Path) -> Path:
    """A copy of the scenes in which one frame, which rank 1 loads, lacks its second half."""
    root = folder / "scenes"
    shutil.copytree(world.folder / "scenes", root)
    config = load_config(DEMO_RECIPE, world.arguments(folder, data__root=root))
    frames = list(dict.fromkeys(path for sample in load_mixture(config.data, "train") for path in sample.frames))
    frames[1].write_bytes(frames[1].read_bytes()[: frames[1].stat().st_size // 2])
    return root


def flip_optimizer_bit(engine: Path) -> None:
    """Flip a bit in the middle of the optimizer shard. It changes a number, so only the hash shows it."""
    (file,) = engine.glob("*optim_states.pt")
    flip_bit(file, file.stat().st_size // 2)


class MakeFolderOnUnpickle:
    """An object whose pickle creates a folder when it is loaded without restrictions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def with_malicious_shard(trained: Path, run: Path) -> Path:
    """A copy of a run whose newest checkpoint has a shard with code in its pickle, and correct hashes."""
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / f"step-{STEPS:06d}"
    (shard,) = (newest / "engine").glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": MakeFolderOnUnpickle(run / "it-ran")}, shard)
    description = read_manifest(newest)
    files = {name: atomic_io.digest(newest / name) for name in description.pop("files")}
    write_manifest(newest, description, files)
    return run
