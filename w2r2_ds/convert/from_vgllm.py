"""Convert a VG-LLM checkpoint into a Qwen2.5-VL directory, a VGGT directory and a geometry merger.

OUT/vlm/                          standard Qwen2.5-VL directory, with the tokenizer and processor files of the source
    vggt/                         config.json and model.safetensors of the geometry encoder
    geometry_merger.safetensors   tensors of the merger
    model.yaml                    model options, for --config

VG-LLM (github.com/LaVi-Lab/VG-LLM, arXiv 2505.24625) stores all three in one state_dict, with the tensor names of
Qwen2.5-VL before transformers 4.52, and adds its own keys to the flat config.json of Qwen2.5-VL.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from w2r2_ds.config.io import model_from_tree
from w2r2_ds.config.schema import ModelConfig
from w2r2_ds.models.family import find_family
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.merger_io import MERGER
from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.encoder import REFERENCE_FRAMES
from w2r2_ds.models.vggt.loading import CONFIG, HEAD_PREFIXES, save_vggt
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.weights.loading import load_tokenizer, load_vision_spec, meta_model
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.files.output_folder import new_folder
from w2r2_ds.utils.files.safetensors_io import weight_files

T = TypeVar("T")

PREFIXES = {
    "visual.": ("vlm", "model.visual."),
    "model.": ("vlm", "model.language_model."),
    "lm_head.": ("vlm", "lm_head."),
    "merger.": ("geometry_merger", ""),
    "vggt.aggregator.": ("vggt", "aggregator."),
}
"""Name prefix in VG-LLM -> (part, name prefix in that part)."""
SKIPPED_PREFIXES = tuple(f"vggt.{head}" for head in HEAD_PREFIXES)
"""Name prefixes of VGGT's prediction heads, which are not used."""
VGLLM_KEYS = {
    "use_vggt_feature": False,
    "use_dense_supervision": False,
    "distill_loss_weight": None,
    "reference_frame": "first",
    "vggt_merger_hidden_dim": 4096,
    "add_ground_classifier": False,
}
"""Keys that VG-LLM adds to Qwen2.5-VL's config.json, with their defaults."""
MODEL_OPTIONS = "model.yaml"
"""File of the model options in the new folder, for --config."""
COPIED = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*", "*processor_config.json", "generation_*.json")
"""Tokenizer and processor files of a standard Qwen2.5-VL directory."""


def import_vgllm(source: Path, out: Path) -> ModelConfig:
    """Convert a VG-LLM checkpoint, atomically.

    Args:
        source: directory of the VG-LLM checkpoint.
        out: new directory.

    Returns:
        The model options of ``model.yaml``; options that the file does not have are defaults.

    Raises:
        ValueError: `out` is not a new or empty folder with enough space;
            `source` is not a VG-LLM checkpoint, lacks a file, or does not have exactly the
            weights that its config.json describes (the message names the first difference).
    """
    load_tokenizer(source)  # this and the next line raise ValueError for missing files
    load_vision_spec(source)
    copied = [file for pattern in COPIED for file in sorted(source.glob(pattern))]
    for file in (source / CONFIG, *copied):
        check_no_remote_code(file)
    qwen_config, own = _read_config(source / CONFIG)
    with new_folder(out, needed_bytes=sum(file.stat().st_size for file in weight_files(source))) as folder:
        try:
            vlm, vggt, merger = _modules(split_state(_read_state(source)), qwen_config, own["vggt_merger_hidden_dim"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        options = _options(out, vggt, own)
        vlm.save_pretrained(folder / "vlm")
        for file in copied:
            shutil.copyfile(file, folder / "vlm" / file.name)
        save_vggt(vggt, folder / "vggt")
        save_file({name: tensor.contiguous() for name, tensor in merger.state_dict().items()}, folder / MERGER)
        (folder / MODEL_OPTIONS).write_text(yaml.safe_dump({"model": options}, sort_keys=False))
    return model_from_tree(options, str(out / MODEL_OPTIONS))


def _options(out: Path, vggt: VGGT, own: Mapping[str, Any]) -> dict[str, Any]:
    """The model options of ``model.yaml``, from VG-LLM's own keys."""
    return {
        "vlm": str(out.absolute() / "vlm"),
        "geometry": {
            "name": "vggt",
            "path": str(out.absolute() / "vggt"),
            "layers": [vggt.config.depth - 2],  # VG-LLM uses the features of the last layer but one
            "reference_frame": own["reference_frame"],
        },
        "merger_hidden": own["vggt_merger_hidden_dim"],
        "merger": str(out.absolute() / MERGER),
        "fusion": "add",
    }


def check_no_remote_code(file: Path) -> None:
    """Raise ValueError if a JSON file to be copied names remote code (``auto_map``)."""
    if file.suffix == ".json" and file.name != "vocab.json" and "auto_map" in read_json_object(file):
        raise ValueError(f"{file}: auto_map names remote code, which is never run here; remove the field.")


def split_state(state: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Split VG-LLM's state_dict into its parts and rename the tensors; weights of VGGT's heads are skipped.

    Args:
        state: name in VG-LLM -> tensor.

    Returns:
        Part (``vlm``, ``vggt``, ``geometry_merger``) -> name in that part -> tensor. The names of the VLM are those of
        the modules in transformers 5.

    Raises:
        ValueError: a name belongs to no part.
    """
    parts: dict[str, dict[str, T]] = {part: {} for part, _ in PREFIXES.values()}
    for name, value in state.items():
        if name.startswith(SKIPPED_PREFIXES):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"{name} belongs neither to Qwen2.5-VL, VGGT nor the geometry merger; VG-LLM's use_dense_supervision "
                "and add_ground_classifier are not supported."
            )
        part, ours = PREFIXES[prefix]
        parts[part][ours + name.removeprefix(prefix)] = value
    return parts


def fill(module: nn.Module, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Assign the tensors of one part to its module, without a copy.

    Args:
        module: module on the meta device.
        part: name of the part, for messages.
        tensors: tensors of the part, from `split_state`.

    Raises:
        ValueError: a tensor is unknown, missing, of another shape or quantised; the message has its name in VG-LLM.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # Tied parameters have several names. The first is the owner: `named_parameters` lists the embedding, not the head.
    owners = {id(parameter): name for name, parameter in module.named_parameters()}
    assert module.state_dict().keys() == parameters.keys(), "persistent buffers are not filled"
    # Checked here and not by `load_state_dict`, whose messages have our names instead of VG-LLM's.
    for name in sorted(tensors.keys() - parameters.keys()):
        raise ValueError(f"{vgllm_name(part, name)} has no place in the {part} that {CONFIG} describes.")
    for name, parameter in parameters.items():
        owner = owners[id(parameter)]
        if owner not in tensors:
            raise ValueError(f"{vgllm_name(part, owner)} is missing.")
        tensor = tensors.get(name, tensors[owner])
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{vgllm_name(part, name)} is {given}, not floating-point {list(parameter.shape)}.")
        if owner != name and name in tensors and not torch.equal(tensor, tensors[owner]):
            raise ValueError(f"{vgllm_name(part, name)} is not {vgllm_name(part, owner)}, to which {CONFIG} ties it.")
    # Not strict: names are checked above, and a tied output head gets its tensor below.
    module.load_state_dict({name: tensors[name] for name in owners.values()}, strict=False, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def vgllm_name(part: str, name: str) -> str:
    """Name in VG-LLM of a tensor of a part; the inverse of the renaming of `split_state`."""
    theirs, ours = next(
        (theirs, ours) for theirs, (owner, ours) in PREFIXES.items() if owner == part and name.startswith(ours)
    )
    return theirs + name.removeprefix(ours)


def vggt_config(tensors: Mapping[str, torch.Tensor]) -> VGGTConfig:
    """Configuration of a VGGT from the shapes of its tensors, because VG-LLM does not store it.

    Two values cannot be derived: the number of attention heads of the ViT (assumed equal to that of the other blocks)
    and the base of the rotary position embedding (default). Both are right for the public 1B model, the only one that
    VG-LLM uses.

    Args:
        tensors: name -> tensor of the part ``vggt``.

    Raises:
        ValueError: a tensor whose shape is needed is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if f"aggregator.{name}" not in tensors:
            raise ValueError(f"vggt.aggregator.{name} is missing.")
        return tuple(tensors[f"aggregator.{name}"].shape)

    def depth(blocks: str) -> int:
        found = (re.match(rf"aggregator\.{blocks}\.(\d+)\.", name) for name in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    width, patch = shape("camera_token")[-1], shape("patch_embed.patch_embed.proj.weight")[-1]
    heads = width // shape("frame_blocks.0.attn.q_norm.weight")[0]
    return VGGTConfig(
        img_size=patch * math.isqrt(shape("patch_embed.pos_embed")[1] - 1),
        patch_size=patch,
        embed_dim=width,
        depth=depth("frame_blocks"),
        num_heads=heads,
        mlp_ratio=shape("frame_blocks.0.mlp.fc1.weight")[0] / width,
        num_register_tokens=shape("register_token")[2],
        vit_depth=depth(r"patch_embed\.blocks"),
        vit_num_heads=heads,
        vit_mlp_ratio=shape("patch_embed.blocks.0.mlp.fc1.weight")[0] / width,
    )


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of config.json that are Qwen2.5-VL's, and those that are VG-LLM's own.

    Raises:
        ValueError: it is not the configuration of a VG-LLM checkpoint, or an option of VG-LLM is not supported.
    """
    values = read_json_object(file)
    own = {key: values.pop(key, default) for key, default in VGLLM_KEYS.items()}
    if own["use_vggt_feature"] is not True:
        raise ValueError(f"{file}: use_vggt_feature is not true; pass the directory of a VG-LLM checkpoint.")
    if own["reference_frame"] not in REFERENCE_FRAMES:
        raise ValueError(f"{file}: reference_frame {own['reference_frame']!r} is neither first nor last.")
    return values, own


def _modules(
    parts: Mapping[str, Mapping[str, torch.Tensor]], qwen_config: dict[str, Any], merger_hidden: int
) -> tuple[PreTrainedModel, VGGT, GeometryMerger]:
    """The VLM, VGGT and geometry merger with their weights.

    Args:
        parts: tensors from `split_state`.
        qwen_config: config.json without VG-LLM's own keys.
        merger_hidden: hidden size of the merger.
    """
    # Without the architecture, which is VG-LLM's class; `save_pretrained` writes that of the VLM.
    config: Any = CONFIG_MAPPING[qwen_config["model_type"]].from_dict({**qwen_config, "architectures": None})
    # On the meta device there is no memory and no random initialisation; `fill` assigns the tensors of the files.
    vlm = meta_model(config)
    hidden = config.text_config.hidden_size
    merge = find_family(config.model_type).tower_sizes(config).merge_size
    with torch.device("meta"):
        vggt = VGGT(vggt_config(parts["vggt"]))
        # VGGT concatenates the features of its frame attention and its global attention.
        merger = GeometryMerger(2 * vggt.config.embed_dim, hidden, merger_hidden, merge)
    for part, module in (("vlm", vlm), ("vggt", vggt), ("geometry_merger", merger)):
        fill(module, part, parts[part])
    return vlm, vggt, merger


def _read_state(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of the weight files of a directory. Raises ValueError if a file is broken."""
    try:
        return {name: tensor for file in weight_files(source) for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the weights cannot be read ({error}); a file is broken or incomplete: copy it again."
        ) from error
