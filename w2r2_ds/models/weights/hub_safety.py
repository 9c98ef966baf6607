"""Reject models that would run remote code or load pickles, before transformers reads them.

``trust_remote_code`` is never set, so that transformers ignores an ``auto_map``. Three ways remain, which are checked
here: attention kernels of the hub, a PEFT adapter in the model's directory, and weights that are not safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from w2r2_ds.utils.files.safetensors_io import INDEX, weight_files
from w2r2_ds.utils.packages import import_problem

CODE_FIELDS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})
"""Fields of a config.json, or of a config inside it, that select an implementation."""
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Attention implementation -> its package.

If it is not installed, but the package `kernels` is, transformers downloads and runs code of the hub instead.
"""


def check_config(raw: Any, location: str) -> None:
    """Check that no field of a config.json selects an implementation of the hub (``OWNER/NAME``).

    Args:
        raw: parsed JSON; nested objects are checked too.
        location: path of the file, for messages.

    Raises:
        ValueError: a field does.
    """
    # A field may have one value for the whole model, or an object with one per sub-model: `json.dumps` covers both.
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if key in CODE_FIELDS and "/" in json.dumps(value):
            raise ValueError(f"{location}: {key} {value!r} is code of the Hugging Face Hub; remove the field")
        check_config(value, location)


def check_model_files(name: str, attention: str) -> None:
    """Check a model's directory or hub id before its weights are loaded.

    Args:
        name: directory or hub id.
        attention: transformers attention implementation.

    Raises:
        ValueError: the attention's package cannot be imported, the attention is code of the hub, there is a PEFT
            adapter, or the index of the weights lists something other than safetensors files of the same directory.
    """
    if "/" in attention:
        raise ValueError(f"model.attention {attention} is code of the Hugging Face Hub; choose sdpa")
    package = FLASH_PACKAGES.get(attention, "torch")
    if problem := import_problem(package):
        raise ValueError(f"model.attention is {attention}, but {package} {problem}; install it or choose sdpa")
    if find_adapter_config_file(name) is not None:
        raise ValueError(
            f"{name} holds a PEFT adapter ({ADAPTER_CONFIG_NAME}); pass the model's own directory, and an adapter of "
            "this project with launchers/evaluate.py --checkpoint"
        )
    if (Path(name) / INDEX).is_file():
        weight_files(Path(name))
