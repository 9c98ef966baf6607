"""Rank script of test_linear.py: which linear function models use before and after an engine with ZeRO-3 is made.

`work` reads ``FOLDER/cases.pkl`` and writes ``FOLDER/found.json``.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from zero3_cases import Case

CASES = {
    "kernel": Case("kernel", [[["four"]]]),  # every layer is a leaf module: `lora_projection`
    "PEFT": Case("PEFT", [[["four"]]], {"push": "unblocked", "mu": 0.001}),  # no leaf modules: PEFT's forward
}


@contextlib.contextmanager
def kept_weights(model: Any) -> Iterator[set[str]]:
    """Names of the parameters of which the graph keeps a view, so that ZeRO-3 cannot free their memory."""
    import torch

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept: set[str] = set()

    def pack(tensor: Any) -> Any:
        if id(tensor._base) in names:
            kept.add(names[id(tensor._base)])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def work(folder: Path) -> None:
    """Entry point of the rank: write case -> findings to found.json."""
    import deepspeed
    import torch
    import torch.nn.functional as functional
    from transformers.integrations import HfDeepSpeedConfig

    from w2r2_ds.models.build import build_model, load_frontend, load_geometry
    from w2r2_ds.training.deepspeed.config import resolve_ds_config
    from w2r2_ds.training.deepspeed.engine import make_engine
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build
    from zero3_cases import batches_of, step_config

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    model_config, samples, raw = pickle.loads((folder / "cases.pkl").read_bytes())
    device, stock = torch.device("cpu"), functional.linear
    images = torch.rand(2, 3, 42, 56, generator=torch.Generator().manual_seed(3)).bfloat16()
    geometry = load_geometry(replace(model_config, dtype="bfloat16"), device)
    before = geometry.encode(images)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        config, frontend = step_config(case, model_config), load_frontend(model_config)
        ds_config = resolve_ds_config(raw, path=name, global_batch=1, micro_batch=1, world_size=1, bf16=False)
        keep_alive = HfDeepSpeedConfig(ds_config)
        with contextlib.suppress(ValueError):  # the VLM is loaded, then the merger is not found
            build_model(replace(config.model, merger=str(folder / "missing")), device, 1)
        restored = functional.linear is stock
        model = build_model(config.model, device, 1)
        engine = make_engine(model, frontend, config, ds_config, device)
        del keep_alive
        (batch,) = batches_of(case, 0, samples, frontend, config)
        with kept_weights(model) as kept:
            loss, _ = engine(batch)
        engine.backward(loss)
        found[name] = {
            "stock": restored and functional.linear is stock,
            "features": torch.equal(geometry.encode(images), before),
            "kept": sorted(kept),
        }
        engine.destroy()
    # DeepSpeed's own setting, to see that both findings depend on it.
    ds_config["zero_optimization"]["memory_efficient_linear"] = True
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        torch.nn.Linear(2, 2)
    found["patched"] = {"stock": functional.linear is stock, "features": torch.equal(geometry.encode(images), before)}
    (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
