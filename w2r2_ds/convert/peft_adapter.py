"""Export a checkpoint as a PEFT adapter directory with geometry merger and model card, and load such an adapter.

ADAPTER/adapter_config.json, adapter_model.safetensors   LoRA weights, for peft and transformers
        geometry_merger.safetensors                      tensors of the merger (VG-LLM's names) and of the fusion
        w2r2_card.json                                   base models, configuration, metrics, versions
        README.md                                        model card, with instructions to load the adapter
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from w2r2_ds.config.io import from_tree, relocated
from w2r2_ds.config.io import load_config as load_run_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import build_model, fingerprint
from w2r2_ds.models.merger_io import MERGER, load_merger, merger_tensors
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.compat import check_fingerprint
from w2r2_ds.training.checkpoint.manifest import MANIFEST, find_checkpoint, read_manifest
from w2r2_ds.training.checkpoint.weights import load_trainable
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.files.output_folder import new_folder
from w2r2_ds.utils.files.safetensors_io import read_strictly
from w2r2_ds.utils.versions import versions

ADAPTER_CARD, LORA = "w2r2_card.json", "adapter_model.safetensors"
# Replaces the empty template that peft writes.
README = """---
base_model: {quoted}
library_name: peft
tags: [w2r2, {encoder}]
---

# A W2R2 adapter for {base}

LoRA weights and a geometry merger, trained with W2R2-DS {version} to step {step}.
Objective: push term `{objective[push_term][name]}`, lambda {objective[lambda_det]}, mu {objective[mu]}.
Geometry features: {geometry} (frozen, not included), fusion `{model[fusion]}`.
The whole configuration is in `w2r2_card.json`.

| file | content |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | LoRA weights, for peft |
| `geometry_merger.safetensors` | tensors of the geometry merger, and of the fusion as `fusion.NAME` |

With W2R2-DS, from frames and geometry (pass `--vlm` and `--geometry_path` if the base models have moved):

    python launchers/evaluate.py --checkpoint THIS_FOLDER --geometry fused

With peft and transformers only (2D only, no geometry):

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained({quoted}, dtype="auto")
    model = PeftModel.from_pretrained(base, "THIS_FOLDER")
"""


def export_adapter(path: Path, out: Path, vlm: str | None = None, geometry_path: str | None = None) -> Path:
    """Export a checkpoint, or the newest checkpoint of a run, as an adapter, atomically.

    Args:
        path: folder of the run or checkpoint.
        out: new folder of the adapter.
        vlm: directory or hub id of the VLM; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder; None for the one of training.

    Returns:
        `out`.

    Raises:
        ValueError: `path` is an adapter or has no checkpoint, a trained tensor is empty, or `out` is not
            a new or empty folder that can be written.
    """
    if (path / ADAPTER_CARD).is_file():
        raise ValueError(
            f"{path} is an exported adapter already; pass the run or the checkpoint that it was exported from."
        )
    checkpoint = find_checkpoint(path)
    with new_folder(out) as folder:
        config = relocated(load_run_config(checkpoint / "config.yaml"), vlm=vlm, geometry_path=geometry_path)
        # PEFT and the evaluation load the base models by these names, also from another working directory.
        models = config.model
        config = relocated(config, vlm=_absolute(models.vlm), geometry_path=_absolute(models.geometry.path))
        check_fingerprint(read_manifest(checkpoint)["model"], fingerprint(config.model), checkpoint / MANIFEST)
        model = build_model(config.model, torch.device("cpu"), config.train.seed)
        load_trainable(checkpoint, model)
        # LoRA does not train the embedding layers; without the option peft may add both matrices to the adapter.
        cast(PeftModel, model.vlm).save_pretrained(str(folder), save_embedding_layers=False)
        save_file(merger_tensors(model), folder / MERGER)
        content = card(config, model, checkpoint)
        (folder / ADAPTER_CARD).write_text(json.dumps(content, indent=2) + "\n")
        (folder / "README.md").write_text(readme(content), encoding="utf-8")
        check_no_empty_tensor(folder)
    return out


def _absolute(name: str) -> str:
    """The absolute path of a directory; a hub id, or the empty path of an encoder without files, stays."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def card(config: RunConfig, model: W2R2, checkpoint: Path) -> dict[str, Any]:
    """Content of w2r2_card.json.

    Args:
        config: configuration of the run.
        model: trained model.
        checkpoint: checkpoint folder, for step, metrics and versions.
    """
    manifest = read_manifest(checkpoint)
    return {
        "base_model": config.model.vlm,
        "geometry_model": config.model.geometry.path,
        "model": model.fingerprint,
        "step": manifest["step"],
        "training_metrics": manifest["metrics"],
        "trained_with": manifest["versions"],
        "exported_with": versions(),
        "configuration": asdict(config),
    }


def readme(content: dict[str, Any]) -> str:
    """Content of README.md, from that of w2r2_card.json."""
    model, path = content["model"], content["geometry_model"]
    source = f"layers {model['geometry_layers']} of {path}" if path else "no weight files"
    return README.format(
        base=content["base_model"],
        quoted=json.dumps(content["base_model"]),  # a string literal of YAML and of Python
        encoder=json.dumps(model["geometry_encoder"]),
        geometry=f"encoder `{model['geometry_encoder']}`, {source}",
        version=content["trained_with"]["w2r2_ds"],
        step=content["step"],
        objective=content["configuration"]["objective"],
        model=model,
    )


def check_no_empty_tensor(out: Path) -> None:
    """Raise ValueError if a tensor of a safetensors file is empty, as a ZeRO-3 parameter is unless it was gathered."""
    for file in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.numel() == 0:
                raise ValueError(f"{file}: {name} is empty; the checkpoint was saved without gathering its tensors.")


def adapter_config(path: Path) -> RunConfig:
    """The run configuration of an exported adapter, from its card.

    Raises:
        ValueError: the card has no configuration, or it is not valid.
    """
    return from_tree(read_card(path)["configuration"], f"{path / ADAPTER_CARD}: configuration")


def read_card(path: Path) -> dict[str, Any]:
    """Content of w2r2_card.json of an adapter. Raises ValueError if a field is missing."""
    file = path / ADAPTER_CARD
    content = read_json_object(file)
    for field in ("configuration", "model"):
        if not isinstance(content.get(field), dict):
            raise ValueError(f"{file}: field {field!r} is missing or not an object; export the adapter again.")
    return content


def load_adapter(path: Path, config: RunConfig, device: torch.device) -> W2R2:
    """Load the model of an exported adapter.

    The LoRA options come from the card. adapter_config.json is not read, because peft imports the modules that it
    names, and the file may be untrusted.

    Args:
        path: folder of the adapter.
        config: run configuration (`adapter_config`), with the paths of the base models on this machine.
        device: device of the model.

    Raises:
        ValueError: a file is missing or broken, or does not have exactly the tensors of this model.
    """
    content = read_card(path)
    check_fingerprint(content["model"], fingerprint(config.model), path / ADAPTER_CARD)
    model = build_model(config.model, device, config.train.seed)
    load_lora(cast(PeftModel, model.vlm), path / LORA)
    load_merger(model, path / MERGER)
    return model


def load_lora(vlm: PeftModel, file: Path) -> None:
    """Load the LoRA weights of an adapter, strictly.

    Args:
        vlm: model with LoRA layers.
        file: adapter_model.safetensors.

    Raises:
        ValueError: the file cannot be read, or does not have exactly the model's LoRA tensors.
    """
    # The file must have exactly the names and shapes of the model's own LoRA tensors.
    expected = get_peft_model_state_dict(vlm, save_embedding_layers=False)
    set_peft_model_state_dict(vlm, read_strictly(file, "the LoRA weights", expected))
