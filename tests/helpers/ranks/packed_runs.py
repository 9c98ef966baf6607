"""Rank script of tests/training/test_packed_training.py: short runs, packed by scene and unpacked.

The unpacked runs train on the same samples in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import ZERO3, World

QUESTIONS_PER_SCENE, STEPS = 4, 3


def arguments(world: Path, out: Path, **changes: object) -> list[str]:
    defaults = {"train__steps": STEPS, "train__save_every": STEPS, "model__lora_dropout": 0.0, "data__workers": 0}
    return ["--deepspeed", str(ZERO3), *World(world).arguments(out, **defaults | changes)]


class FixedBatchSampler:
    """Batch sampler with given micro-batches.

    Args:
        batches: sample indices of each micro-batch.
    """

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches
        self.micro_batch = max(map(len, batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def work(folder: Path) -> None:
    """Entry point of a rank. With one rank, writes the content of the batches and the errors to report.json."""
    import deepspeed
    import torch.distributed as dist

    from w2r2_ds.commands.train import read_arguments
    from w2r2_ds.data.dataset import load_mixture
    from w2r2_ds.evaluation.validator import AnswerValidation
    from w2r2_ds.training import build, trainer
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build
    from w2r2_ds.training.step import W2R2Step

    skip_shm_build()
    deepspeed.init_distributed()
    world = Path((folder / "world").read_text())
    forward, trainer.dry_run = W2R2Step.forward, lambda run, batch: None
    sequences: list[tuple[tuple[str, ...], int]] = []

    def recorded(self: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        sequences.append((batch.ids, batch.input_ids.shape[0]))
        return forward(self, batch, *arguments, **options)

    W2R2Step.forward = recorded  # type: ignore[method-assign]
    packed = {"data__questions_per_scene": QUESTIONS_PER_SCENE}
    trainer.train(*read_arguments(arguments(world, folder / "packed_batches", **packed)), AnswerValidation)
    if dist.get_world_size() == 1:
        errors = []
        other = packed | {"data__questions_per_scene": 2, "train__steps": STEPS, "resume": "auto"}
        try:
            trainer.train(*read_arguments(arguments(world, folder / "packed_batches", **other)), AnswerValidation)
        except ValueError as error:
            errors.append(str(error))
        config, _ = read_arguments(arguments(world, folder / "apart"))
        index_of = {sample.id: index for index, sample in enumerate(load_mixture(config.data, "train"))}
        sampler = build.GlobalBatchSampler
        for name, changes in {"apart": {}, "plain": {"data__packing": True}}.items():
            batches = [[index_of[sample_id] for sample_id in ids] for ids, _ in sequences[: 2 * STEPS]]
            build.GlobalBatchSampler = lambda batches=batches, **_: FixedBatchSampler(batches)  # type: ignore[misc, assignment]
            trainer.train(*read_arguments(arguments(world, folder / name, **changes)), AnswerValidation)
        build.GlobalBatchSampler = sampler  # type: ignore[misc]
        (folder / "report.json").write_text(json.dumps({"errors": errors, "sequences": sequences}))
    dist.destroy_process_group()
