"""Reject model folders and hub ids that would run remote code or load pickles, before transformers reads them.

`trust_remote_code` is never given, so that an ``auto_map`` is not followed. Three ways remain that transformers takes
without being asked: kernels of the hub in place of an attention, an adapter that lies in the folder, and weights that
are no safetensors.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from w2r2_ds.utils.safetensors_io import INDEX, weight_files

CODE_FIELDS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})
"""Fields of a config.json that name an implementation, of the whole or of a part."""
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Where these are missing, transformers takes code of the hub in their place, if the package `kernels` is there."""


def refuse_hub_code(raw: Any, where: str) -> None:
    """Refuse an attention or experts that are code of the hub, ``OWNER/NAME``, anywhere in a config.json.

    Raises:
        ValueError: names the field.
    """
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if key in CODE_FIELDS and "/" in json.dumps(value):
            raise ValueError(f"{where}: {key} {value!r} is code of the Hugging Face Hub; remove the field")
        refuse_hub_code(value, where)


def refuse_strangers_code(name: str, attention: str) -> None:
    """Look at a directory or hub id before its weights are loaded.

    Args:
        name: of `models.vlm.load_vlm`.
        attention: name of the attention implementation.

    Raises:
        ValueError: the attention is not installed here or would be code of the hub, there is an adapter, or the index
            of the weights names a file that is no safetensors file beside it.
    """
    if "/" in attention:
        raise ValueError(f"model.attention {attention} is code of the Hugging Face Hub; choose sdpa")
    package = FLASH_PACKAGES.get(attention, "torch")
    if find_spec(package) is None:
        raise ValueError(
            f"model.attention is {attention}, which needs a package that is not installed ({package}); install it or "
            "choose sdpa"
        )
    if find_adapter_config_file(name) is not None:
        raise ValueError(
            f"{name} holds a PEFT adapter ({ADAPTER_CONFIG_NAME}); give the model's own directory, and an adapter of "
            "this project to launchers/evaluate.py --checkpoint"
        )
    if (Path(name) / INDEX).is_file():
        weight_files(Path(name))
