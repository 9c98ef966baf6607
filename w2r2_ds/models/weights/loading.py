"""Load a VLM from a directory or hub id; its ``config.json`` determines class and sizes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils.hub import cached_file

from w2r2_ds.models.attention.sdpa_backends import disable_cudnn_sdpa
from w2r2_ds.models.family import find_family
from w2r2_ds.models.weights.hub_safety import check_config, check_model_files
from w2r2_ds.types.vision import VisionSpec
from w2r2_ds.utils.files.json_io import read_json_object

PREPROCESSOR_FILE = "preprocessor_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model_config(name_or_path: str | Path) -> Any:
    """Read and check ``config.json``; returns the transformers config of its ``model_type``.

    Raises:
        ValueError: there is no such directory, ``config.json`` cannot be read, its ``model_type`` is not supported, its
            weights are quantised, or a field selects code of the hub.
    """
    name = _check_name(name_or_path)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(_unreadable(name, "config.json", error)) from error
    find_family(raw.get("model_type"), f"{name}/config.json")
    check_config(raw, f"{name}/config.json")
    _check_not_quantised(raw, f"{name}/config.json")
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of a config. Raises ValueError if its `model_type` is not supported."""
    find_family(config.model_type, config.name_or_path or type(config).__name__)
    found: type[PreTrainedModel] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return found


def load_vlm(
    name_or_path: str | Path, dtype: torch.dtype = torch.bfloat16, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """Load the whole model; every weight must be in its files. Switches cuDNN's SDPA off for the process.

    Args:
        name_or_path: a directory or a hub id.
        dtype: dtype of all weights.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` or another one of transformers.

    Raises:
        ValueError: as ``load_model_config``; also if the weights do not match the config exactly, or the attention
            implementation is not installed.
    """
    name = _check_name(name_or_path)
    config = load_model_config(name)
    check_model_files(name, attn_implementation)
    from_pretrained = functools.partial(
        AutoModelForImageTextToText.from_pretrained,
        name,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in the info, for which `_check_loaded` raises
        trust_remote_code=False,
        use_safetensors=True,  # a .bin is a pickle
    )
    try:
        if hf_deepspeed.is_deepspeed_zero3_enabled():
            # Under ZeRO-3, transformers neither looks for tensors that the model does not have nor compares shapes. On
            # the meta device it does both, and reads only the names and shapes in the files.
            with without_zero3_init():
                _check_loaded(name, from_pretrained(device_map="meta")[1])
        model, info = from_pretrained()
    except (OSError, SafetensorError) as error:
        raise ValueError(_unreadable(name, "model weights", error)) from error
    except ImportError as error:
        raise ValueError(
            f"model.attention is {attn_implementation}, which needs a package that is not installed "
            f"({' '.join(str(error).split())}); install it or choose sdpa"
        ) from error
    _check_loaded(name, info)
    disable_cudnn_sdpa()
    find_family(config.model_type).speed_up_tower(model)
    return model


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model and check that it matches config.json.

    Raises:
        ValueError: a chat or vision token is missing or has another id than in the config, a token id has no embedding
            row, or there is no chat template.
    """
    name = _check_name(name_or_path)
    config = load_model_config(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(name, "tokenizer.json", error)) from error
    vocabulary = tokenizer.get_vocab()
    family = find_family(config.model_type)
    for token in (*family.chat_tokens, *family.vision_tokens):
        if token not in vocabulary:
            raise ValueError(
                f"{name}/tokenizer.json: no token {token}; use the tokenizer files that came with the model"
            )
    for token, field in family.vision_tokens.items():
        if vocabulary[token] != getattr(config, field):
            raise ValueError(
                f"{name}/tokenizer.json: {token} has id {vocabulary[token]} but config.json has {field} = "
                f"{getattr(config, field)}; use the tokenizer files that came with the model"
            )
    rows = config.text_config.vocab_size
    if max(vocabulary.values()) >= rows:
        raise ValueError(
            f"{name}/tokenizer.json: token id {max(vocabulary.values())} has no embedding row, config.json has "
            f"vocab_size = {rows}; use the tokenizer files that came with the model"
        )
    if tokenizer.chat_template is None:
        raise ValueError(f"{name}: no chat template; add the model's chat_template.jinja (or tokenizer_config.json)")
    return tokenizer


def load_vision_spec(name_or_path: str | Path) -> VisionSpec:
    """Sizes and token ids of the vision tower, from ``config.json`` and ``preprocessor_config.json``.

    Raises:
        ValueError: a file or field is missing, or the two files differ in a size.
    """
    name = _check_name(name_or_path)
    config = load_model_config(name)
    try:
        preprocessor = read_json_object(str(cached_file(name, PREPROCESSOR_FILE)))
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(name, PREPROCESSOR_FILE, error)) from error
    return find_family(config.model_type).vision_spec(config, preprocessor, f"{name}/{PREPROCESSOR_FILE}")


@contextmanager
def without_zero3_init() -> Iterator[None]:
    """Context in which model constructors ignore an existing ``HfDeepSpeedConfig`` (ZeRO-3) and make whole tensors."""
    # transformers builds sub-models with `_from_config`, which partitions their weights if this weak reference finds an
    # `HfDeepSpeedConfig`.
    reference = getattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None)
    live = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if live is not None:
            hf_deepspeed.set_hf_deepspeed_config(live)


def meta_model(source: str | Path | PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: names, shapes and methods, no weights. Never partitioned, also under ZeRO-3."""
    config = source if isinstance(source, PreTrainedConfig) else load_model_config(source)
    chosen = model_class(config)
    with without_zero3_init(), torch.device("meta"):
        return chosen(config).eval()


def _check_not_quantised(raw: dict[str, Any], location: str) -> None:
    """Raise ValueError if a config.json, or the config of a sub-model in it, is that of a quantised model."""
    for part, fields in (("", raw), *((f"{key}.", value) for key, value in raw.items() if isinstance(value, dict))):
        found = fields.get("quantization_config")
        if found is not None:
            method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
            raise ValueError(
                f"{location}: {part}quantization_config: the weights are quantised ({method}), which is not supported; "
                "use the directory or hub id of the model in bfloat16"
            )


def _check_name(name_or_path: str | Path) -> str:
    """The name as a string. Raises ValueError unless it is a directory or has the form of a hub id."""
    name = str(name_or_path)
    if not name or not (Path(name).is_dir() or _HUB_ID.fullmatch(name)):
        raise ValueError(
            f"model {name!r} is no directory here; correct model.vlm (or --vlm): a directory, or a hub id OWNER/NAME"
        )
    return name


def _unreadable(name: str, files: str, error: Exception) -> str:
    """Error message for files that cannot be read from a directory or a hub id."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return f"{name}: cannot read {files} ({first_line}); copy the complete model directory"
    return (
        f"model {name!r}: no such directory, and as a hub id its {files} could not be fetched ({first_line}); correct "
        "model.vlm (or --vlm), or fetch the model where there is a network and give its directory"
    )


def _check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless config and weight files have the same tensors with the same shapes."""
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(entry[0] for entry in info["mismatched_keys"]),
    }
    found = [f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in problems.items() if keys]
    if found or info["error_msgs"]:
        detail = "; ".join(found + [str(message) for message in info["error_msgs"]])
        raise ValueError(f"{name}: the weights do not fit config.json ({detail}); copy the complete model directory")
