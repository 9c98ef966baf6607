"""Rank script of test_gathers.py: record ZeRO-3 gathers of a small model with the proportions of a 7B model.

`work` reads ``FOLDER/cases.pkl`` and writes ``FOLDER/found.json``.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

STEPS = 3  # DeepSpeed records its trace in step 1 and prefetches from step 3 on


@dataclass
class GatherRecord:
    """Gathers of the decoder layers' parameters, in elements.

    Attributes:
        gathered: layer index -> number of gathers of its largest matrix.
        elements: number of gathered elements.
        late: number of elements whose gather had not begun when their layer was called.
        live: largest number of elements gathered at a time, other parameters included.
        tower: number of fetches of modules of the vision tower that have weights.
    """

    gathered: Counter[int] = field(default_factory=Counter)
    elements: int = 0
    late: int = 0
    live: int = 0
    tower: int = 0


@contextlib.contextmanager
def record_gathers(model: Any) -> Iterator[GatherRecord]:
    """Record all gathers in the block."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        InflightParamRegistry,
        PartitionedParameterCoordinator,
    )

    layers = model.base.model.language_model.layers
    owner = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    largest = {id(layer.mlp.gate_proj.base_layer.weight) for layer in layers}
    sharded = [parameter for parameter in model.parameters() if not parameter.ds_persist]
    found = GatherRecord()
    register, fetch = InflightParamRegistry.__setitem__, PartitionedParameterCoordinator._fetch_sub_module_impl
    absent = ZeroParamStatus.NOT_AVAILABLE
    tower = set(model.family.vision_tower(model.base).modules())

    def registered(self: Any, parameter: Any, handle: Any) -> None:
        register(self, parameter, handle)
        if id(parameter) in owner:
            found.elements += parameter.ds_numel
            found.gathered[owner[id(parameter)]] += id(parameter) in largest
        found.live = max(found.live, sum(each.ds_numel for each in sharded if each.ds_status != absent))

    def fetched(self: Any, module: Any, forward: bool, is_leaf: bool) -> None:
        if module in tower:
            found.tower += any(True for _ in module.parameters(recurse=is_leaf))
        elif is_leaf:
            found.late += sum(each.ds_numel for each in module.parameters() if each.ds_status == absent)
        fetch(self, module, forward, is_leaf)

    InflightParamRegistry.__setitem__ = registered
    PartitionedParameterCoordinator._fetch_sub_module_impl = fetched
    try:
        yield found
    finally:
        InflightParamRegistry.__setitem__ = register
        PartitionedParameterCoordinator._fetch_sub_module_impl = fetch


def work(folder: Path) -> None:
    """Entry point of a rank: write DeepSpeed configuration -> record of the last step to found.json."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    from w2r2_ds.models.build import build_model, load_frontend
    from w2r2_ds.training.deepspeed.config import resolve_ds_config
    from w2r2_ds.training.deepspeed.engine import make_engine
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build
    from zero3_cases import batches_of, step_config

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    case, model_config, samples, ds_configs = pickle.loads((folder / "cases.pkl").read_bytes())
    base, frontend = step_config(case, model_config), load_frontend(model_config)
    config = base
    (batch,) = batches_of(case, dist.get_rank(), samples, frontend, config)
    found = {}
    for name, raw in ds_configs.items():
        sizes = {"global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch}
        config = replace(base, train=replace(base.train, shard_vision_tower=name != "whole tower"))
        ds_config = resolve_ds_config(raw, path=name, world_size=2, bf16=False, **sizes)
        keep_alive = HfDeepSpeedConfig(ds_config)
        model = build_model(config.model, torch.device("cpu"), 1)
        engine = make_engine(model, frontend, config, ds_config, torch.device("cpu"))
        del keep_alive
        for _ in range(STEPS):
            with record_gathers(model) as last:
                loss = engine(batch)[0]
                engine.backward(loss)
                engine.step()
        found[name] = (
            vars(last) | {"loss": float(loss)} | {"gathered": [last.gathered[i] for i in range(max(last.gathered) + 1)]}
        )
        engine.destroy()
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
