"""Export a checkpoint as a PEFT adapter directory with the geometry merger and a model card, and load it again.

ADAPTER/adapter_config.json, adapter_model.safetensors   load with peft and transformers
        geometry_merger.safetensors                      the merger's tensors (VG-LLM's names) and the fusion's
        w2r2_card.json                                   base model, configuration, metrics, versions
        README.md                                        model card: the same as text, and how to load the adapter
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from w2r2_ds.config.io import from_tree, relocated
from w2r2_ds.config.io import load_config as load_run_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import build_model
from w2r2_ds.models.merger_io import MERGER, load_merger, merger_tensors
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.compat import check_fingerprint
from w2r2_ds.training.checkpoint.manifest import find_checkpoint, read_manifest
from w2r2_ds.training.checkpoint.weights import load_trainable
from w2r2_ds.utils.json_io import read_json_object
from w2r2_ds.utils.safetensors_io import read_strictly
from w2r2_ds.utils.versions import versions

ADAPTER_CARD, LORA = "w2r2_card.json", "adapter_model.safetensors"
README = """---
base_model: {quoted}
library_name: peft
tags: [w2r2, vggt]
---

# A W2R2 adapter for {base}

LoRA weights and a geometry merger, trained with W2R2-DS {version} to step {step}.
Objective: push term `{objective[push_term][name]}`, lambda {objective[lambda_det]}, mu {objective[mu]}.
Geometry: layers {model[geometry_layers]} of {geometry} (frozen, not here), joined by `fusion {model[fusion]}`.
Everything else of the training is in `w2r2_card.json`.

| file | holds |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | the LoRA weights, for peft |
| `geometry_merger.safetensors` | the merger's tensors, and the fusion's as `fusion.NAME` |

With W2R2-DS, from frames and geometry (give moved base models with `--vlm` and `--geometry_path`):

    python launchers/evaluate.py --checkpoint THIS_FOLDER --geometry fused

With peft and transformers only (frames only, no geometry):

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained({quoted}, dtype="auto")
    model = PeftModel.from_pretrained(base, "THIS_FOLDER")
"""
"""Replaces the empty template that peft writes."""


def export_adapter(path: Path, out: Path, vlm: str | None = None, geometry_path: str | None = None) -> Path:
    """Export the newest checkpoint of a run, or a checkpoint, to the new directory `out`, atomically.

    Args:
        path: a run or a checkpoint.
        out: new folder.
        vlm: path of the VLM, if it is not the one of the training run.
        geometry_path: path of the geometry encoder, if it is not the one of the training run.

    Raises:
        ValueError: `path` is an adapter or has no checkpoint, `out` is not empty, or a trained tensor is empty.
    """
    if (path / ADAPTER_CARD).is_file():
        raise ValueError(f"{path} is an exported adapter already; name the run or the checkpoint that it came from.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name another --out or remove it.")
    checkpoint = find_checkpoint(path)
    config = relocated(load_run_config(checkpoint / "config.yaml"), vlm=vlm, geometry_path=geometry_path)
    model = build_model(config.model, torch.device("cpu"), config.train.seed)
    load_trainable(checkpoint, model)
    # Written to a temporary folder and renamed: `out` exists only when it is complete.
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Without embedding layers: LoRA does not train them, and peft would add both matrices to the adapter.
    cast(PeftModel, model.vlm).save_pretrained(str(temporary), save_embedding_layers=False)
    save_file(merger_tensors(model), temporary / MERGER)
    described = card(config, model, checkpoint)
    (temporary / ADAPTER_CARD).write_text(json.dumps(described, indent=2) + "\n")
    (temporary / "README.md").write_text(readme(described))
    check_not_empty(temporary)
    os.replace(temporary, out)
    return out


def card(config: RunConfig, model: W2R2, checkpoint: Path) -> dict[str, Any]:
    """Content of w2r2_card.json."""
    saved = read_manifest(checkpoint)
    return {
        "base_model": config.model.vlm,
        "geometry_model": config.model.geometry.path,
        "model": model.fingerprint,
        "step": saved["step"],
        "training_metrics": saved["metrics"],
        "trained_with": saved["versions"],
        "exported_with": versions(),
        "configuration": asdict(config),
    }


def readme(described: dict[str, Any]) -> str:
    """Content of README.md."""
    return README.format(
        base=described["base_model"],
        quoted=json.dumps(described["base_model"]),  # as YAML and as Python
        geometry=described["geometry_model"],
        version=described["trained_with"]["w2r2_ds"],
        step=described["step"],
        objective=described["configuration"]["objective"],
        model=described["model"],
    )


def check_not_empty(out: Path) -> None:
    """Raise ValueError if a tensor has shape (0,), as an ungathered ZeRO-3 parameter has."""
    for file in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.numel() == 0:
                raise ValueError(f"{file}: {name} is empty; the checkpoint was saved without gathering its tensors.")


def adapter_config(path: Path) -> RunConfig:
    """The configuration of an exported adapter, from its card.

    Raises:
        ValueError: the card has none, or it is not valid.
    """
    return from_tree(read_card(path)["configuration"], f"{path / ADAPTER_CARD}: configuration")


def read_card(path: Path) -> dict[str, Any]:
    """The card of an adapter; raises ValueError if a field is missing."""
    file = path / ADAPTER_CARD
    found = read_json_object(file)
    for field in ("configuration", "model"):
        if not isinstance(found.get(field), dict):
            raise ValueError(f"{file}: field {field!r} is missing or not an object; export the adapter again.")
    return found


def load_adapter(path: Path, config: RunConfig, device: torch.device) -> W2R2:
    """Load the model of an exported adapter.

    adapter_config.json is not read: peft imports the modules that it names.

    Args:
        path: the adapter.
        config: with the paths of the base models.
        device: device of the result.

    Raises:
        ValueError: a file is missing or broken, or does not have exactly the tensors of this model.
    """
    described = read_card(path)
    model = build_model(config.model, device, config.train.seed)
    check_fingerprint(described["model"], model, path / ADAPTER_CARD)
    load_lora(cast(PeftModel, model.vlm), path / LORA)
    load_merger(model, path / MERGER)
    return model


def load_lora(vlm: PeftModel, file: Path) -> None:
    """Load LoRA weights from a file that peft wrote, strictly.

    Raises:
        ValueError: the file cannot be read, or does not have exactly the model's LoRA tensors.
    """
    # The model's own tensors give the names, shapes and dtypes that the file must have.
    own = get_peft_model_state_dict(vlm, save_embedding_layers=False)
    set_peft_model_state_dict(vlm, read_strictly(file, "the LoRA weights", own))
