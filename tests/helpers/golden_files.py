"""Find recorded reference numbers: ``NAME.json``, most with tensors in ``NAME.safetensors`` beside it.

All files under ``tests/golden``, or under the folder that the environment variable ``W2R2_GOLDEN`` names, are looked
at. What a file holds decides which tests read it, not its name; files that no kind wants are left alone.
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

DEFAULT = Path(__file__).parents[1] / "golden"
ROOT = Path(os.environ.get("W2R2_GOLDEN") or DEFAULT)


@dataclass(frozen=True, eq=False)
class Golden:
    """One recorded file.

    Attributes:
        path: of the JSON file.
        record: its content.
    """

    path: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Path below the folder, without the ending."""
        return self.path.relative_to(ROOT).with_suffix("").as_posix()

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Key -> recorded tensor."""
        return load_file(self.path.with_suffix(".safetensors"))

    def beside(self, part: str) -> Any:
        """Content of the file that belongs to this one: ``scanqa.PART.json`` beside ``scanqa.expected.json``."""
        return json.loads(self.path.with_name(self.path.name.replace("expected", part)).read_text(encoding="utf-8"))

    @property
    def tolerance(self) -> float:
        """The first number in exponent form of the file's statement, such as 1e-4."""
        return float(re.findall(r"\d+(?:\.\d+)?e-\d+", self.record["tolerance"])[0])

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor as the JSON file states it."""
        return tuple(self.record["tensors"][key]["shape"])


def find(kind: Callable[[dict[str, Any]], bool]) -> list[Golden]:
    """The files of one kind; none is an error in the default folder, where every kind has one.

    Raises:
        FileNotFoundError: no JSON file at all, or none of this kind in the default folder.
    """
    paths = sorted(ROOT.rglob("*.json"))
    records = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    found = [Golden(path, record) for path, record in records if isinstance(record, dict) and kind(record)]
    if not found and (ROOT == DEFAULT or not paths):
        raise FileNotFoundError(f"{ROOT} has no golden file that {kind.__name__} recognises.")
    return found


def is_aggregator(record: dict[str, Any]) -> bool:
    """Runs of VGGT's aggregator with all its weights."""
    return "cases" in record and "param/aggregator.camera_token" in record.get("tensors", {})


def is_geometry_misc(record: dict[str, Any]) -> bool:
    """Rotary positions or position tables by themselves."""
    return any(key.startswith(("rope/out/", "pos_embed/out/")) for key in record.get("tensors", {}))


def is_vggt_images(record: dict[str, Any]) -> bool:
    """Images that VGGT's loader resized."""
    return _results_have(record, "images", "mode", "shape")


def is_qwen_images(record: dict[str, Any]) -> bool:
    """Images cut into Qwen's patches."""
    return _results_have(record, "image", "images_vggt_shape", "pixel_values_shape")


def is_vgllm_run(record: dict[str, Any]) -> bool:
    """Runs of VG-LLM with all its weights."""
    return "grad_norm_and_sum" in record and "param/merger.ln_q.weight" in record.get("tensors", {})


def is_scanrefer_scores(record: dict[str, Any]) -> bool:
    """Scores that public evaluators of ScanRefer gave."""
    return record.get("task") == "scanrefer" and "protocols" in record


def is_scan2cap_scores(record: dict[str, Any]) -> bool:
    """The same for Scan2Cap."""
    return record.get("task") == "scan2cap" and "protocols" in record


def is_scanqa_scores(record: dict[str, Any]) -> bool:
    """The same for ScanQA."""
    return record.get("task") == "scanqa" and "protocols" in record


def is_caption_vectors(record: dict[str, Any]) -> bool:
    """Small corpora of captions with all scores."""
    vectors = record.get("vectors")
    return isinstance(vectors, dict) and all({"references", "candidates"} <= set(each) for each in vectors.values())


def is_tokenizer_pairs(record: dict[str, Any]) -> bool:
    """Texts and what the PTB tokenizer makes of them."""
    return _pairs_have(record, "text", "tokens")


def is_clean_answer_pairs(record: dict[str, Any]) -> bool:
    """Answers and what LEO's normalisation makes of them."""
    return _pairs_have(record, "text", "clean")


def _pairs_have(record: dict[str, Any], *keys: str) -> bool:
    pairs = record.get("pairs")
    return isinstance(pairs, list) and bool(pairs) and all(isinstance(p, dict) and set(keys) <= set(p) for p in pairs)


def _results_have(record: dict[str, Any], *keys: str) -> bool:
    results = record.get("results")
    cases = list(results.values()) if isinstance(results, dict) else []
    return bool(cases) and all(isinstance(case, dict) and set(keys) <= set(case) for case in cases)
