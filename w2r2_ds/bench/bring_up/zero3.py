"""Training steps under ZeRO-3 with the shipped settings, `overlap_comm` off, or vision blocks that are no leaf modules.

``python -m w2r2_ds.bench.bring_up.zero3 RESULT SHAPE FRAMES ROUNDS`` is one rank.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.harness import Spread, find_device, time_ratio
from w2r2_ds.bench.model import build
from w2r2_ds.bench.ranks import run_ranks
from w2r2_ds.bench.report import BenchReport
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.training.deepspeed.config import resolve_ds_config

LAYERS = 4
"""Decoder layers, and blocks of the vision tower."""
SHIPPED, NO_OVERLAP, NO_TOWER_LEAF = "as shipped", "overlap_comm off", "vision blocks no leaf modules"
CASES = (SHIPPED, NO_OVERLAP, NO_TOWER_LEAF)


def run(settings: Settings) -> BenchReport:
    """Wall-clock seconds per step for every case; one rank per GPU of this machine, or one rank on a CPU."""
    cuda = settings.device.type == "cuda"
    ranks = torch.cuda.device_count() if cuda else 1
    shape, frames = settings.shapes[0], settings.frames[0]
    found = run_ranks(__name__, ranks, shape, frames, settings.rounds, seconds=settings.remaining())
    title = f"seconds per step under ZeRO-3, {ranks} ranks, {shape} with {LAYERS} layers, {frames} frames"
    report = BenchReport("zero3", title, [])
    spreads = {name: Spread(tuple(seconds)) for name, seconds in found.items()}
    for name, spread in spreads.items():
        ratio = time_ratio(spread, spreads[SHIPPED])
        report.rows.append({"case": name, **spread.columns(), f"/{SHIPPED}": ratio})
    report.notes.append("Both encoders run in every step. A ratio above 1 means that the shipped setting is faster.")
    return report


class Engine:
    """A DeepSpeed engine under ZeRO-3, and a batch.

    Args:
        shape: sizes of the model.
        case: one of `CASES`.
    """

    def __init__(self, shape: Shape, case: str) -> None:
        from w2r2_ds.training.deepspeed.engine import make_engine, zero3_leaf_modules  # deepspeed takes seconds

        subject, world = build(shape, find_device()), dist.get_world_size()
        self.batch = subject.batch()
        config = RunConfig(train=TrainConfig(global_batch=world, micro_batch=1, lr=1e-7, merger_lr=1e-7, steps=10))
        ds_config = resolve_ds_config(
            zero3_json(overlap_comm=case != NO_OVERLAP),
            path=__file__,
            global_batch=world,
            micro_batch=1,
            world_size=world,
            bf16=shape.dtype == "bfloat16",
        )
        leaves = zero3_leaf_modules(subject.model, stop_gradient=True)
        if case == NO_TOWER_LEAF:
            leaves.remove(type(subject.model.family.tower_blocks(subject.model.base)[0]))
        self.engine = make_engine(subject.model, subject.frontend, config, ds_config, subject.device, leaves)

    def seconds(self) -> float:
        """Wall-clock seconds of one optimizer step."""
        synchronize()
        began = time.perf_counter()
        self.engine.backward(self.engine(self.batch)[0])
        self.engine.step()
        synchronize()
        return time.perf_counter() - began


def zero3_json(overlap_comm: bool) -> dict[str, Any]:
    """The parts of ds_configs/zero3.json that determine the speed."""
    zero = {
        "stage": 3,
        "overlap_comm": overlap_comm,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 300_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 600_000_000,
        "stage3_max_reuse_distance": 500_000_000,
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: "auto" for name in sizes} | {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": 1.0,  # the norm of all gradients is read on the host
    }


def synchronize() -> None:
    """Wait for the GPU, then for all ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def main(result: Path, shape_name: str, frames: int, rounds: int) -> None:
    """Run one rank; rank 0 writes the seconds of every case."""
    import deepspeed

    find_device()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank())
    (shape,) = find_shapes(shape_name, [frames])
    shape = replace(shape, layers=LAYERS, vision_depth=LAYERS, vision_full=(LAYERS - 1,))
    engines = {case: Engine(shape, case) for case in CASES}
    for engine in engines.values():
        for _ in range(3):  # DeepSpeed records the order of modules first, and prefetches by it afterwards
            engine.seconds()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        # Interleaved and in alternating order, so that a slowdown of the machine affects all cases alike.
        for name in list(engines) if turn % 2 == 0 else reversed(engines):
            seconds[name].append(engines[name].seconds())
    if dist.get_rank() == 0:
        result.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
