"""Files of ``w2r2 diagnose`` without a model: the real functions on answers, features and attention made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.diagnostics.attention.anchors import PASSES, AnchorRecord, AttentionAnchors
from w2r2_ds.diagnostics.bootstrap import Estimate
from w2r2_ds.diagnostics.causality.measures import Answers, measure_causality
from w2r2_ds.diagnostics.feature_map import FeatureMapOptions, map_of
from w2r2_ds.diagnostics.token_features import TokenFeatures

TASK = "scanrefer"
ROWS = {"fused": "2D + 3D", "zero": "2D only"}


def write_diagnoses(
    folder: Path, names: Sequence[str] = ("scene0000_00|1", "scene0000_00|2"), data: str = "val"
) -> None:
    """Write all files of a diagnosis: Table 1, causality, cues, feature map, attention with heat maps.

    Args:
        folder: folder of the files.
        names: ids of the samples with heat maps.
        data: prepared folder that the files name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {"checkpoint": "run", "task": TASK, "data": [{"path": data, "manifest": "0"}]}
    diagnosis = described | table1() | {"causality": causality(), "cues": cues()}
    _write(folder / f"diagnosis-{TASK}.json", diagnosis)
    _write(folder / f"features-{TASK}.json", described | features(names).to_json())
    pictures = {name: f"attention-{TASK}/{index:03}.png" for index, name in enumerate(names)}
    for path in pictures.values():
        (folder / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (484, 332), (90, 120, 160)).save(folder / path)
    _write(folder / f"attention-{TASK}.json", described | anchors(names).to_json() | {"pictures": pictures})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, allow_nan=False))


def table1(fused: float = 0.6, zero: float = 0.2) -> dict[str, Any]:
    """Table 1 with two rows and one metric."""
    values = {"fused": fused, "zero": zero}
    common = {
        "protocol": "scanrefer/vgllm-direct",
        "group": "overall",
        "metric": "acc@0.25",
        "samples": 60,
        "scenes": 12,
    }
    cells = [common | {"row": row} | _estimate(value) for row, value in values.items()]
    return {"table1": {"rows": [{"row": row, "label": label} for row, label in ROWS.items()], "cells": cells}}


def _estimate(value: float) -> dict[str, Any]:
    return asdict(Estimate(value, value - 0.05, value + 0.05))


def causality(slope: float = 0.5) -> dict[str, Any]:
    """Causality of a model that follows `slope` of the movement along x and y, and ignores the rest."""
    generator = np.random.default_rng(0)
    before = np.concatenate([generator.normal(0, 1, (120, 3)), np.ones((120, 3)), np.zeros((120, 3))], axis=1)
    moved = before.copy()
    moved[:, :6] *= generator.choice([0.7, 1.4], (120, 1))
    after = before.copy()
    after[:, :2] += slope * (moved - before)[:, :2] + generator.normal(0, 0.01, (120, 2))
    answers = Answers([f"scene{index % 12}" for index in range(120)], before, after, moved)
    measures = {"amounts": [0.7, 1.4], "samples": 60, **measure_causality(answers, resamples=100)}
    replaced = {
        name: {"samples": 60, "unchanged": _estimate(value)} for name, value in (("zero", 0.3), ("shuffle", 0.4))
    }
    reason = "the point maps are in the camera's frame, and the answers are in the world"
    each = {"samples": 10, "compared": 9, "moved": _estimate(0.5), "unchanged": _estimate(0.2)}
    return {
        "interventions": {"scale": measures},
        "replaced": replaced,
        "removed_frame": {"target": each | {"by_frames": {"1": each, "4+": each}}},
        "paired": {"camera": {name: measures[name] for name in ("rows", "compared", "unchanged", "numbers")}},
        "not_evaluated": {"turn": reason},
    }


def cues() -> dict[str, Any]:
    """Shares of both rows."""
    shares = {"fused": (0.5, 0.2), "zero": (0.1, 0.7)}
    return {
        row: {
            measure: {
                "scored": 50,
                "truth": _estimate(truth),
                "cue": _estimate(cue),
                "neither": _estimate(1 - truth - cue),
            }
            for measure in ("iou", "centre")
        }
        for row, (truth, cue) in shares.items()
    }


def features(names: Sequence[str], tokens: int = 24, layers: int = 4) -> Any:
    """Feature map of random tokens; the fused ones are the 2D tokens plus a part of the geometry."""
    generator = np.random.default_rng(0)
    two_d, three_d = generator.normal(0, 1, (tokens, 8)), generator.normal(3, 1, (tokens, 8))
    fused = two_d + 0.5 * three_d
    states = tuple((two_d, two_d + 0.5 * three_d / (index + 1)) for index in range(layers))
    found = TokenFeatures(tuple(names[index % len(names)] for index in range(tokens)), two_d, three_d, fused, states)
    return map_of(found, FeatureMapOptions(perplexity=5.0))


def anchors(names: Sequence[str], layers: int = 4) -> AttentionAnchors:
    """Anchors of both passes; those of the fused pass are on the target."""
    coverage = np.array([1.0, 0.5, 0.0, 0.0])
    records = {
        name: [
            AnchorRecord(
                sample=sample,
                attention=np.array([0.4, 0.1, 0.1, 0.2], dtype=np.float32),
                coverage=coverage,
                visual_share=tuple(0.8 - 0.1 * layer for layer in range(layers)),
                target_mass=tuple((0.5 if name == "fused" else 0.2) + 0.05 * layer for layer in range(layers)),
                token=0 if name == "fused" else 3,
                frame=index,
                pixel=(10.0, 20.0),
                center=(1.0, 2.0, 0.5),
                size=(0.5, 0.5, 0.5),
                s=0.3,
                distance=float("nan") if index else 0.7,
            )
            for index, sample in enumerate(names)
        ]
        for name in PASSES
    }
    typical = TypicalBox(2.0, np.ones(3), {}, 10)
    return AttentionAnchors(typical, records, not_in_view=1)
