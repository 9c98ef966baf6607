"""Find golden files: recorded reference numbers in ``NAME.json``, most with tensors in ``NAME.safetensors``.

Searches ``tests/golden``, or the folder in the environment variable ``W2R2_GOLDEN``. The kind of a file is derived from
its fields (functions ``is_*``), not from its name. Files of no known kind are ignored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DEFAULT = Path(__file__).parents[2] / "golden"
ROOT = Path(os.environ.get("W2R2_GOLDEN") or DEFAULT)


@dataclass(frozen=True, eq=False)
class Golden:
    """A golden file.

    Attributes:
        path: path of the JSON file.
        record: content of the JSON file.
    """

    path: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Path relative to the folder, without suffix."""
        return self.path.relative_to(ROOT).with_suffix("").as_posix()

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Key -> recorded tensor."""
        return load_file(self.path.with_suffix(".safetensors"))

    def beside(self, part: str) -> Any:
        """Content of another part of the same record: ``scanqa.PART.json`` for ``scanqa.expected.json``."""
        return json.loads(self.path.with_name(self.path.name.replace("expected", part)).read_text(encoding="utf-8"))

    @property
    def tolerance(self) -> float:
        """The first number in exponent notation, such as 1e-4, in the field `tolerance`."""
        return float(re.findall(r"\d+(?:\.\d+)?e-\d+", self.record["tolerance"])[0])

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor according to the JSON file."""
        return tuple(self.record["tensors"][key]["shape"])


def find(kind: Callable[[dict[str, Any]], bool]) -> list[Golden]:
    """Golden files of one kind.

    Raises:
        FileNotFoundError: no JSON file at all, or none of this kind in the default folder, which has all kinds.
    """
    paths = sorted(ROOT.rglob("*.json"))
    records = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    found = [Golden(path, record) for path, record in records if isinstance(record, dict) and kind(record)]
    if not found and (ROOT == DEFAULT or not paths):
        raise FileNotFoundError(f"{ROOT} has no golden file that {kind.__name__} recognises.")
    return found


def is_aggregator(record: dict[str, Any]) -> bool:
    """Outputs of VGGT's aggregator, with its weights."""
    return "cases" in record and "param/aggregator.camera_token" in record.get("tensors", {})


def is_vggt_heads(record: dict[str, Any]) -> bool:
    """Outputs of VGGT's heads on recorded tokens, with their weights."""
    return "param/camera_head.empty_pose_tokens" in record.get("tensors", {}) and "input" in record


def is_geometry_misc(record: dict[str, Any]) -> bool:
    """Rotary embeddings, position embeddings, pose encodings and unprojected depth of VGGT."""
    return any(key.startswith(("rope/out/", "pos_embed/out/")) for key in record.get("tensors", {}))


def is_vggt_images(record: dict[str, Any]) -> bool:
    """Images resized by VGGT's loader."""
    return _results_have(record, "images", "mode", "shape")


def is_qwen_images(record: dict[str, Any]) -> bool:
    """Images split into Qwen's patches."""
    return _results_have(record, "image", "images_vggt_shape", "pixel_values_shape")


def is_vgllm_run(record: dict[str, Any]) -> bool:
    """Outputs and gradients of VG-LLM, with its weights."""
    return "grad_norm_and_sum" in record and "param/merger.ln_q.weight" in record.get("tensors", {})


def is_scanrefer_scores(record: dict[str, Any]) -> bool:
    """Scores of public ScanRefer evaluators."""
    return record.get("task") == "scanrefer" and "protocols" in record


def is_scan2cap_scores(record: dict[str, Any]) -> bool:
    """Scores of public Scan2Cap evaluators."""
    return record.get("task") == "scan2cap" and "protocols" in record


def is_scanqa_scores(record: dict[str, Any]) -> bool:
    """Scores of public ScanQA evaluators."""
    return record.get("task") == "scanqa" and "protocols" in record


def is_caption_vectors(record: dict[str, Any]) -> bool:
    """Small caption corpora with all scores."""
    vectors = record.get("vectors")
    return isinstance(vectors, dict) and all({"references", "candidates"} <= set(each) for each in vectors.values())


def is_tokenizer_pairs(record: dict[str, Any]) -> bool:
    """Texts and their PTB tokens."""
    return _pairs_have(record, "text", "tokens")


def is_clean_answer_pairs(record: dict[str, Any]) -> bool:
    """Answers and their normalised text (LEO's `clean_answer`)."""
    return _pairs_have(record, "text", "clean")


def _pairs_have(record: dict[str, Any], *keys: str) -> bool:
    pairs = record.get("pairs")
    return isinstance(pairs, list) and bool(pairs) and all(isinstance(p, dict) and set(keys) <= set(p) for p in pairs)


def _results_have(record: dict[str, Any], *keys: str) -> bool:
    results = record.get("results")
    cases = list(results.values()) if isinstance(results, dict) else []
    return bool(cases) and all(isinstance(case, dict) and set(keys) <= set(case) for case in cases)
