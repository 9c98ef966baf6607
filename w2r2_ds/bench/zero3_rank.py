"""One rank of `zero3_bytes`, placed by the environment: ``python -m w2r2_ds.bench.zero3_rank SHAPE RESULT ROUNDS``."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from w2r2_ds.bench.geometry_cache import OnDisk
from w2r2_ds.bench.harness import find_device
from w2r2_ds.bench.model import build
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.bench.zero3_bytes import WAYS
from w2r2_ds.bench.zero3_gathers import Counts, counting, fused_alone
from w2r2_ds.config.schema import ObjectiveConfig, RunConfig, TrainConfig
from w2r2_ds.training.deepspeed.config import resolve_ds_config
from w2r2_ds.training.deepspeed.engine import make_engine

STEPS = 3
"""The first one makes DeepSpeed's trace; what the last one gathers is what every later one does."""
LAYERS_LIVE = 2


def work(shape: Shape, rounds: int) -> dict[str, Any]:
    """Every way, each with a model of its own: counted, then timed in turns by the clock, for ranks wait."""
    runs = {way: Run(shape, way) for way in WAYS}
    found: dict[str, Any] = {}
    for way, run in runs.items():
        counts = run.counted()
        found["parameters"] = run.size
        found[way] = {"bytes": counts.bytes, "gathers": sorted(set(counts.layers.values())), "seconds": []}
    for turn in range(rounds):
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            dist.barrier()
            began = time.perf_counter()
            runs[way].step()
            dist.barrier()
            found[way]["seconds"].append(time.perf_counter() - began)
    return found


class Run:
    """Training steps of one way.

    Attributes:
        size: bytes of all parameters that are sharded.
    """

    def __init__(self, shape: Shape, way: str) -> None:
        subject = build(shape, find_device())
        self.model, fresh = subject.model, subject.batch()
        self.batch = OnDisk(self.model, fresh).into(fresh, both=True)
        world = dist.get_world_size()
        pass_order: Any = "sequential" if way == "single pass" else way
        train = TrainConfig(global_batch=world, micro_batch=1, lr=1e-7, merger_lr=1e-7, steps=10, pass_order=pass_order)
        config = RunConfig(objective=ObjectiveConfig(), train=train)
        ds_config = resolve_ds_config(
            sharded(self.model.family.language_model(self.model.base)),
            path=__file__,
            global_batch=world,
            micro_batch=1,
            world_size=world,
            bf16=False,
        )
        self.engine = make_engine(self.model, subject.frontend, config, ds_config, subject.device)
        if way == "single pass":
            self.engine.module.two_pass = functools.partial(fused_alone, self.model)
        self.size = sum(each.ds_numel * each.element_size() for each in self.engine.module.parameters())

    def counted(self) -> Counts:
        """What the last of the first steps gathers, as every later one does."""
        for _ in range(STEPS):
            with counting(self.model.family.language_model(self.model.base)) as counts:
                self.step()
        return counts

    def step(self) -> None:
        """One optimizer step."""
        self.engine.backward(self.engine(self.batch)[0])
        self.engine.step()


def sharded(language_model: Any) -> dict[str, Any]:
    """A DeepSpeed JSON that keeps two decoder layers gathered at most, as a large model's does."""
    layer = sum(parameter.numel() for parameter in language_model.layers[0].parameters())
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": LAYERS_LIVE * layer,
        "stage3_max_reuse_distance": LAYERS_LIVE * layer,
        "stage3_prefetch_bucket_size": layer // 2,
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: "auto" for name in sizes} | {"zero_optimization": zero, "bf16": {"enabled": "auto"}}


if __name__ == "__main__":
    (chosen,) = find_shapes(sys.argv[1], [])
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl", auto_mpi_discovery=False)
    result = work(chosen, int(sys.argv[3]))
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
