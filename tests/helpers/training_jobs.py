"""The short runs of tests/training/test_trainer.py, some with an error in their input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from runs import SAVE_EVERY, STEPS, ZERO3, Job, World
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.data.loader import load_mixture
from w2r2_ds.training.checkpoint.manifest import read_manifest, write_manifest
from w2r2_ds.utils import atomic_io

FEW = 6
DROPOUT: dict[str, object] = {"model__lora_dropout": 0.1, "train__steps": 4, "train__save_every": 2}
DECODE_GAP: dict[str, object] = {"objective__decode_gap_every": 1, "objective__decode_gap_samples": 2}
AUTO: dict[str, object] = {"resume": "auto"}
STAGES = ("zero2", "zero3_offload")
"""Of ds_configs/, besides zero3."""

RESHARDED = {"apart-zero3": ZERO3, "apart-zero2": ZERO3.with_name("zero2.json")}
APART: dict[str, object] = {"train__steps": FEW, "train__save_every": 3, "train__merger_lr": 3e-4}
"""Rates so far apart that a group with the other's would show."""
NO_DRY_RUN: dict[str, Any] = {"dry_run": False}
"""Without the dry run, where that is not what a run is about; `test_the_dry_run_changes_nothing`."""
EVERY: dict[str, object] = {"train__steps": 3, "train__save_every": 1, "train__keep_last": 9}


def arguments(world: World, out: Path, ds: Path = ZERO3, **changes: object) -> list[str]:
    return ["--deepspeed", str(ds), *world.arguments(out, **changes)]


def on_one_rank(world: World, trained: Path, folder: Path) -> list[Job]:
    """All short runs on one rank; some go on from runs of `on_two_ranks`."""
    contradiction = folder / "contradiction.json"
    contradiction.write_text(json.dumps(json.loads(ZERO3.read_text()) | {"train_micro_batch_size_per_gpu": 2}))
    d, back = folder / "dropout", folder / "dropout-resumed"
    resumed, untouched = folder / "resumed", folder / "untouched"
    shutil.copytree(trained, untouched)
    shutil.copytree(trained, resumed)
    flip_a_bit(resumed / "checkpoints" / f"step-{STEPS:06d}" / "engine")
    booby_trapped = trapped(trained, folder / "trapped")
    jobs = [
        Job("resumed", arguments(world, resumed, **AUTO)),
        Job("trapped", arguments(world, booby_trapped, **AUTO)),
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
    """All short runs on two ranks."""
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
            "two-from-one",
            arguments(world, grown, **AUTO),
            rewind=(str(trained), str(grown), STEPS - SAVE_EVERY),
            **NO_DRY_RUN,
        ),
        *(Job(name, arguments(world, folder / name, ds, **APART), **NO_DRY_RUN) for name, ds in RESHARDED.items()),
        Job("full", arguments(world, folder / "full", **EVERY), disturb=("full", 2), **NO_DRY_RUN),
        Job("taken-over", arguments(world, folder / "taken-over", **EVERY), disturb=("taken over", 2), **NO_DRY_RUN),
        Job("dropout", arguments(world, d, **DROPOUT)),
        Job("dropout-resumed", arguments(world, back, **DROPOUT, **AUTO), rewind=(str(d), str(back), 2), **NO_DRY_RUN),
        Job("cut-frame", arguments(world, folder / "cut", data__root=cut_frame_root(world, folder))),
        Job("other-log", arguments(world, other_log)),
        Job("long", arguments(world, folder / "long", data__max_length=100)),
    ]


def cut_frame_root(world: World, folder: Path) -> Path:
    """A copy of the scenes in which one frame, of rank 1's share, has lost its second half."""
    root = folder / "scenes"
    shutil.copytree(world.folder / "scenes", root)
    config = load_config(DEMO_RECIPE, world.arguments(folder, data__root=root))
    frames = list(dict.fromkeys(path for sample in load_mixture(config.data, "train") for path in sample.frames))
    frames[1].write_bytes(frames[1].read_bytes()[: frames[1].stat().st_size // 2])
    return root


def flip_a_bit(engine: Path) -> None:
    """In the middle of the optimizer's shard, where its numbers are: nothing but a digest can tell."""
    (file,) = engine.glob("*optim_states.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Trap:
    """Unpickled as a program it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def trapped(trained: Path, run: Path) -> Path:
    """A copy of a run in whose newest checkpoint a shard would run something; the digests are right."""
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / f"step-{STEPS:06d}"
    (shard,) = (newest / "engine").glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": Trap(run / "it-ran")}, shard)
    description = read_manifest(newest)
    files = {name: atomic_io.digest(newest / name) for name in description.pop("files")}
    write_manifest(newest, description, files)
    return run
