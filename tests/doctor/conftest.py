"""Fixtures: options and configuration of a run for the doctor, with a prepared data set and two small model folders."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from broken_rank import command
from runs import RECIPE, ZERO3

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def run_options(samples: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Option name -> value of `w2r2 train`, without dashes."""
    from prepared_sets import write_prepared

    folder = tmp_path_factory.mktemp("doctor")
    prepared = samples[0].frames[0].parent / "prepared"
    write_prepared(prepared, samples, prepared.parent)
    vggt = {"embed_dim": 32, "depth": 3, "num_heads": 2, "vit_num_heads": 2}
    for name, config in (("vlm", {"text_config": TEXT | {"num_hidden_layers": 2}}), ("vggt", vggt)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.arange(12.0).reshape(3, 4)}, folder / name / "model.safetensors")
    return {
        "config": str(RECIPE),
        "deepspeed": str(ZERO3),
        "demo.enabled": "false",
        "data.root": str(prepared.parent),
        "data.train": "[{path: prepared}]",
        "data.val": "[{path: prepared}]",
        "data.workers": "0",
        "model.vlm": str(folder / "vlm"),
        "model.geometry.path": str(folder / "vggt"),
        "out": str(folder / "run"),
    }


@pytest.fixture
def config(run_options: dict[str, str]) -> Any:
    """`RunConfig` of `run_options`."""
    from w2r2_ds.commands.doctor import read_arguments

    return read_arguments(command(run_options)).config
