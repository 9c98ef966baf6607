"""About how many bytes the checkpoints of a run will take, from its configuration and the models' sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.checkpoint.manifest import DAMAGED

PER_WEIGHT = 20
"""Bytes: the trained weight twice (safetensors, DeepSpeed's copy; at most 4 each), float32 master, two moments."""


def room_bytes(config: RunConfig) -> int:
    """Free space that the checkpoints of a run still need; a run that goes on has most of them on the disk already.

    One is always needed, as it is written before an old one is removed; 0 where the models' sizes are unknown.
    """
    one = checkpoint_bytes(config) or 0
    # Those kept, the best, the one being written.
    return max(one, (config.train.keep_last + 2) * one - held_bytes(Path(config.out) / "checkpoints"))


def held_bytes(folder: Path) -> int:
    """Of the checkpoints in a folder, each file once; a damaged one stays beside those that are kept, and is left out.

    A file that is removed meanwhile does not count.
    """
    sizes = {}
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if DAMAGED not in name]
        for name in names:
            try:
                found = os.lstat(os.path.join(where, name))
            except OSError:
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Of one checkpoint; None where the models' sizes are unknown."""
    text, vggt = _sizes(Path(config.model.vlm), "text_config"), _sizes(Path(config.model.vggt), "")
    try:
        weights = lora_weights(text, config.model.lora_rank) + merger_weights(
            2 * vggt.get("embed_dim", 1024), text["hidden_size"], config.model.merger_hidden
        )
    except KeyError:
        return None
    return PER_WEIGHT * weights


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
