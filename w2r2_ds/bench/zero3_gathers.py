"""Bytes that ZeRO-3 all-gathers per training step for each `train.pass_order`, and the wall-clock time of the step.

``python -m w2r2_ds.bench.zero3_gathers RESULT SHAPE ROUNDS`` is one rank; `run_ranks` starts all of them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2r2_ds.bench.feature_cache import CachedFeatures
from w2r2_ds.bench.harness import Spread, find_device, time_ratio
from w2r2_ds.bench.model import build
from w2r2_ds.bench.ranks import run_ranks
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import Shape, find_shapes
from w2r2_ds.config.schema import ObjectiveConfig, RunConfig, TrainConfig
from w2r2_ds.models.layer_inputs import OnInput
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.deepspeed.config import resolve_ds_config
from w2r2_ds.types.batch import Batch

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

SINGLE = "single pass"
PASS_ORDERS = (SINGLE, "sequential", "lockstep")
"""Values of `train.pass_order`, and a step without the shortcut for comparison."""
STEPS = 3
"""Steps per pass order; gathers are counted in the last one, because DeepSpeed records the order of modules in the
first one and prefetches by it afterwards."""
LAYERS_LIVE = 2
"""Number of decoder layers that may be gathered at the same time."""


def run(shape: str, ranks: int, rounds: int) -> BenchReport:
    """Report the bytes gathered per step, relative to the bytes of all sharded parameters, and wall-clock seconds."""
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1.")
    find_shapes(shape)  # an unknown shape is an error of this process, not of the ranks
    find_device()  # limits the CPU to one thread, as in the ranks, because the report records the number
    results = run_ranks(__name__, ranks, shape, rounds)
    report = BenchReport("zero3_gathers", f"gathers of ZeRO-3 per step, {ranks} ranks, LoRA, checkpointing", [])
    spreads = {order: Spread(tuple(results[order]["seconds"])) for order in PASS_ORDERS}
    for order in PASS_ORDERS:
        result = results[order]
        report.rows.append(
            {
                "pass_order": order,
                "gathered_mib": result["bytes"] / 2**20,
                "/parameters": result["bytes"] / results["parameters"],
                "fewest per layer": min(result["gathers"]),
                "most per layer": max(result["gathers"]),
                **spreads[order].columns(),
                "/single pass": time_ratio(spreads[order], spreads[SINGLE]),
            }
        )
    report.criteria.append(
        Criterion("bytes, lockstep / single pass", results["lockstep"]["bytes"] / results[SINGLE]["bytes"], 1.0)
    )
    report.notes.append(
        "stage3_max_live_parameters allows two decoder layers here, as in ds_configs/ at real sizes. A model below the "
        "limit would be gathered only once. Seconds are wall-clock time, because ranks wait for each other."
    )
    return report


@dataclass
class GatherCounts:
    """Gathers of ZeRO-3.

    Attributes:
        layers: parameter name -> number of gathers, for parameters of decoder layers.
        bytes: number of bytes gathered, for all parameters.
    """

    layers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@contextmanager
def count_gathers(language_model: nn.Module) -> Iterator[GatherCounts]:
    """Count the gathers that DeepSpeed starts in the block."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry  # takes seconds

    names = {id(parameter): name for name, parameter in language_model.layers.named_parameters()}  # type: ignore[operator,union-attr]
    counts, saved = GatherCounts(dict.fromkeys(names.values(), 0)), InflightParamRegistry.__setitem__

    def counted(self: Any, parameter: Any, handle: Any) -> None:
        counts.bytes += parameter.ds_numel * parameter.element_size()
        if id(parameter) in names:
            counts.layers[names[id(parameter)]] += 1
        saved(self, parameter, handle)

    # DeepSpeed has no counter, but enters a parameter in this registry whenever it starts to gather it.
    InflightParamRegistry.__setitem__ = counted
    try:
        yield counts
    finally:
        InflightParamRegistry.__setitem__ = saved


def fused_pass_only(
    model: W2R2,
    batch: Batch,
    shortcut: VisionOutput,
    fused: VisionOutput,
    include_description: bool,
    on_shortcut_input: OnInput | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass order that runs the fused pass only and returns its states also as those of the shortcut, detached."""
    states = model.answer_hidden_states(batch, fused, include_description)
    return states.detach(), states


class Engine:
    """A DeepSpeed engine under ZeRO-3 with one pass order, on a batch with cached features.

    Attributes:
        size: number of bytes of all sharded parameters.
    """

    def __init__(self, shape: Shape, order: str) -> None:
        from w2r2_ds.training.deepspeed.engine import make_engine  # imports deepspeed, which takes seconds

        subject = build(shape, find_device())
        fresh, world = subject.batch(), dist.get_world_size()
        self.batch = CachedFeatures(subject.model, fresh).into(fresh, both=True)
        self.language_model = subject.model.family.language_model(subject.model.base)
        pass_order: Any = "sequential" if order == SINGLE else order
        train = TrainConfig(global_batch=world, micro_batch=1, lr=1e-7, merger_lr=1e-7, steps=10, pass_order=pass_order)
        ds_config = resolve_ds_config(
            zero3_json(self.language_model),
            path=__file__,
            global_batch=world,
            micro_batch=1,
            world_size=world,
            bf16=False,
        )
        config = RunConfig(objective=ObjectiveConfig(), train=train)
        self.engine = make_engine(subject.model, subject.frontend, config, ds_config, subject.device)
        if order == SINGLE:
            self.engine.module.run_passes = functools.partial(fused_pass_only, subject.model)
        self.size = sum(each.ds_numel * each.element_size() for each in self.engine.module.parameters())

    def count(self) -> GatherCounts:
        """Run the first steps and count the gathers of the last of them."""
        for _ in range(STEPS):
            with count_gathers(self.language_model) as counts:
                self.step()
        return counts

    def step(self) -> None:
        """One optimizer step."""
        self.engine.backward(self.engine(self.batch)[0])
        self.engine.step()


def zero3_json(language_model: Any) -> dict[str, Any]:
    """DeepSpeed JSON that keeps at most two decoder layers gathered, as ds_configs/ do for large models."""
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


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Count the gathers of every pass order, then time its steps. Every pass order has its own model and engine."""
    engines = {order: Engine(shape, order) for order in PASS_ORDERS}
    results: dict[str, Any] = {}
    for order, engine in engines.items():
        counts = engine.count()
        results["parameters"] = engine.size
        results[order] = {"bytes": counts.bytes, "gathers": sorted(set(counts.layers.values())), "seconds": []}
    for turn in range(rounds):
        # Interleaved and in alternating order, so that a slowdown of the machine affects all pass orders alike.
        for order in PASS_ORDERS if turn % 2 == 0 else reversed(PASS_ORDERS):
            dist.barrier()  # otherwise the time of the slowest rank's previous step would count
            began = time.perf_counter()
            engines[order].step()
            dist.barrier()
            results[order]["seconds"].append(time.perf_counter() - began)
    return results


def main(result: Path, shape: str, rounds: int) -> None:
    """Run one rank; rank 0 writes the results."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    measured = measure(find_shapes(shape)[0], rounds)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
