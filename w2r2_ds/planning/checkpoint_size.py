"""About how many bytes the checkpoints of a run will take, from its configuration and the models' sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from w2r2_ds.config import RunConfig

PER_WEIGHT = 20
"""Bytes: the trained weight twice (safetensors, DeepSpeed's copy; at most 4 each), float32 master, two moments."""


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Of all checkpoints that are there at once: those kept, the best, the one being written. None: sizes unknown."""
    text, vggt = _sizes(Path(config.model.vlm), "text_config"), _sizes(Path(config.model.vggt), "")
    try:
        weights = lora_weights(text, config.model.lora_rank) + merger_weights(
            2 * vggt.get("embed_dim", 1024), text["hidden_size"], config.model.merger_hidden
        )
    except KeyError:
        return None
    return (config.train.keep_last + 2) * PER_WEIGHT * weights


def lora_weights(text: dict[str, Any], rank: int) -> int:
    """Weights of LoRA on the seven projections of every decoder layer: rank x (inputs + outputs) each."""
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    queries, keys = heads * head, text["num_key_value_heads"] * head
    sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return int(text["num_hidden_layers"]) * rank * int(sides)


def merger_weights(features: int, hidden: int, merger_hidden: int) -> int:
    """Weights of the geometry merger: norm, and two linear layers over 2 x 2 merged features."""
    return features + (4 * features + 1) * merger_hidden + (merger_hidden + 1) * hidden


def _sizes(folder: Path, section: str) -> dict[str, Any]:
    """A part of ``config.json``; empty where it cannot be read, which the check of the weights tells."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(tree.get(section, tree))
