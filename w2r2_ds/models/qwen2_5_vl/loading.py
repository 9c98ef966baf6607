"""Load a Qwen-VL directory or hub id: the class and every size come from its ``config.json``, never from its path."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
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

from w2r2_ds.models.hub_safety import refuse_hub_code, refuse_strangers_code

SUPPORTED_MODEL_TYPES = ("qwen2_5_vl",)
PREPROCESSOR_FILE = "preprocessor_config.json"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# Token of the tokenizer -> the config field that must hold its id.
VISION_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_config(name_or_path: str | Path) -> Any:
    """Read and check ``config.json``; returns the stock config object of its ``model_type``.

    Raises:
        ValueError: no such directory, no readable ``config.json``, or an unsupported ``model_type``.
    """
    name = _check_name(name_or_path)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(_unreadable(name, "config.json", error)) from error
    check_model_type(raw.get("model_type"), f"{name}/config.json")
    refuse_hub_code(raw, f"{name}/config.json")
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def check_model_type(model_type: str | None, where: str) -> None:
    """Refuse a model that the rest of the project was not tested with; ``where`` names the file in the message."""
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; "
            f"use a model of type {' or '.join(SUPPORTED_MODEL_TYPES)}"
        )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock class for this config, checked for the ``mm_encoder_outputs`` argument that the two passes need."""
    check_model_type(config.model_type, config.name_or_path or type(config).__name__)
    found: type[PreTrainedModel] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    check_forward(found)
    return found


def check_forward(model: type[nn.Module]) -> None:
    """Raise ValueError unless ``model.forward`` accepts ``mm_encoder_outputs`` (transformers 5.18 and later)."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"transformers {transformers.__version__} is too old: {model.__name__}.forward has no mm_encoder_outputs; "
            "install transformers 5.18 or later"
        )


def load_vlm(
    name_or_path: str | Path, dtype: torch.dtype = torch.bfloat16, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """Load the whole model in ``dtype``, every weight from the files.

    Args:
        name_or_path: a directory or a hub id.
        dtype: type of every weight.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` or another that transformers knows.

    Raises:
        ValueError: see ``load_config``; also where the weights do not fit the config exactly.
    """
    name = _check_name(name_or_path)
    config = load_config(name)
    model_class(config)
    refuse_strangers_code(name, attn_implementation)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one sentence
            trust_remote_code=False,
            use_safetensors=True,  # a .bin is a pickle
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(_unreadable(name, "model weights", error)) from error
    except ImportError as error:
        raise ValueError(
            f"model.attention is {attn_implementation}, which needs a package that is not installed "
            f"({' '.join(str(error).split())}); install it or choose sdpa"
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):  # ZeRO-3's loader raises this instead of reporting it
            raise
        detail = " ".join(str(error).split())
        raise ValueError(
            f"{name}: the weights do not fit config.json ({detail}); copy the complete model directory"
        ) from error
    _check_loaded(name, info)
    return model


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer and check that it belongs to the model beside it.

    Raises:
        ValueError: a chat or vision token is missing, its id differs from the config's, the vocabulary has more
            tokens than the model has embedding rows, or there is no chat template.
    """
    name = _check_name(name_or_path)
    config = load_config(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(name, "tokenizer.json", error)) from error
    vocabulary = tokenizer.get_vocab()
    for token in (*CHAT_TOKENS, *VISION_TOKENS):
        if token not in vocabulary:
            raise ValueError(
                f"{name}/tokenizer.json: no token {token}; use the tokenizer files that came with the model"
            )
    for token, field in VISION_TOKENS.items():
        if vocabulary[token] != getattr(config, field):
            raise ValueError(
                f"{name}/tokenizer.json: {token} has id {vocabulary[token]} but config.json says {field} = "
                f"{getattr(config, field)}; use the tokenizer files that came with the model"
            )
    rows = config.text_config.vocab_size
    if max(vocabulary.values()) >= rows:
        raise ValueError(
            f"{name}/tokenizer.json: token id {max(vocabulary.values())} has no embedding row, config.json says "
            f"vocab_size = {rows}; use the tokenizer files that came with the model"
        )
    if tokenizer.chat_template is None:
        raise ValueError(f"{name}: no chat template; add the model's chat_template.jinja (or tokenizer_config.json)")
    return tokenizer


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, model constructors ignore a live ZeRO-3 ``HfDeepSpeedConfig`` and make whole tensors.

    The stock constructors build their sub-models with ``_from_config``, which would partition them.
    """
    reference = getattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None)
    live = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if live is not None:
            hf_deepspeed.set_hf_deepspeed_config(live)


def meta_model(source: str | Path | PreTrainedConfig) -> PreTrainedModel:
    """The model's class on the meta device: names, shapes and methods, no weights and no memory.

    Works with a live ``HfDeepSpeedConfig`` too: this model is never partitioned.
    """
    config = source if isinstance(source, PreTrainedConfig) else load_config(source)
    chosen = model_class(config)
    with whole_weights(), torch.device("meta"):
        return chosen(config).eval()


def position_ids(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multimodal rotary positions, made on the CPU by the stock ``get_rope_index``.

    Args:
        model: a model of ``meta_model`` (only its config and code are used) or a loaded one.
        input_ids: ``[batch, length]`` int64, CPU.
        mm_token_type_ids: ``[batch, length]`` int, 0 text, 1 image pad, 2 video pad.
        attention_mask: ``[batch, length]``, 0 at padding; None where there is none.
        image_grid_thw: ``[images, 3]`` int64 patch grids in order of appearance.
        video_grid_thw: ``[videos, 3]`` int64.
        second_per_grid_ts: ``[videos]`` float seconds between rows of video tokens.

    Returns:
        ``[3, batch, length]`` int64 (temporal, height, width).

    Raises:
        ValueError: the token types do not mark exactly the pad tokens, or the grids hold another number of tokens
            (without this check the stock code would silently give wrong positions).
    """
    config: Any = model.config
    if mm_token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"mm_token_type_ids is {tuple(mm_token_type_ids.shape)} but input_ids is {tuple(input_ids.shape)}"
        )
    merge = config.vision_config.spatial_merge_size**2
    for kind, code, pad, grid in (
        ("image", 1, config.image_token_id, image_grid_thw),
        ("video", 2, config.video_token_id, video_grid_thw),
    ):
        marked = mm_token_type_ids == code
        if not torch.equal(marked, input_ids == pad):
            raise ValueError(f"mm_token_type_ids must be {code} exactly where input_ids is the {kind} pad token {pad}")
        expected = 0 if grid is None else int(grid.prod(-1).sum()) // merge
        if int(marked.sum()) != expected:
            raise ValueError(f"{int(marked.sum())} {kind} pad tokens in the batch but {kind}_grid_thw holds {expected}")
    positions: torch.Tensor
    positions, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        second_per_grid_ts=second_per_grid_ts,
        attention_mask=attention_mask,
    )
    return positions


def _check_name(name_or_path: str | Path) -> str:
    """A directory or something of the form of a hub id, as a string; ValueError for anything else."""
    name = str(name_or_path)
    if not name or not (Path(name).is_dir() or _HUB_ID.fullmatch(name)):
        raise ValueError(
            f"model {name!r} is no directory here; correct model.vlm (or --vlm): a directory, "
            "or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    return name


def _unreadable(name: str, what: str, error: Exception) -> str:
    """One sentence about a file that could not be read, for a directory or a hub id."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return f"{name}: cannot read {what} ({first_line}); copy the complete model directory"
    return (
        f"model {name!r}: no such directory, and as a hub id its {what} could not be fetched ({first_line}); correct "
        "model.vlm (or --vlm), or fetch the model where there is a network and give its directory"
    )


def _read_json(name_or_path: str | Path, filename: str) -> dict[str, Any]:
    """One JSON object of a model directory or hub id."""
    name = _check_name(name_or_path)
    try:
        found = cached_file(name, filename)
        return dict(json.loads(Path(str(found)).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(name, filename, error)) from error


def _three(raw: dict[str, Any], field: str, where: str) -> tuple[float, float, float]:
    """Three numbers of a pre-processor file."""
    values = raw.get(field)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{where}: {field} must be a list of three numbers, found {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


def _check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless every weight was loaded and nothing was left over."""
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(entry[0] for entry in info["mismatched_keys"]),
    }
    found = [f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in problems.items() if keys]
    if found or info["error_msgs"]:
        detail = "; ".join(found + [str(message) for message in info["error_msgs"]])
        raise ValueError(f"{name}: the weights do not fit config.json ({detail}); copy the complete model directory")
