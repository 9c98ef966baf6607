"""A run folder without training: rooms on disk, a metrics.jsonl, and evaluations of hand-made answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hand_records import camera_answer
from prepared_sets import write_prepared
from runs import RECIPE
from w2r2_ds.config.io import load_config, save_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.parsing import parse_grounding
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.resumable import write_records
from w2r2_ds.evaluation.scoring import score_records
from w2r2_ds.types.sample import Sample
from warm_up import prepare_tiny_sets

MARKUP = "<script>window.injected = 1</script><img src=x onerror='window.injected = 1'>&amp;"
"""Text that runs a script if it is not escaped."""
SET = "prepared/scanrefer/val"


def report_config(root: Path, out: Path, **changes: Any) -> RunConfig:
    """A run configuration with one grounding set."""
    options = {
        "out": out,
        "data.root": root,
        "data.train": "[{path: prepared/scanrefer/train}]",
        "data.val": f"[{{path: {SET}}}]",
        **changes,
    }
    return load_config(RECIPE, [word for name, value in options.items() for word in (f"--{name}", str(value))])


def prepare_rooms(root: Path) -> list[Sample]:
    """Prepare the grounding set of synthetic rooms; returns its samples whose target is in a frame."""
    prepare_tiny_sets(report_config(root, root / "unused"))
    return [sample for sample in PreparedSet(root / SET, root) if sample.answer]


def write_run(folder: Path, root: Path, samples: Sequence[Sample], seed: int = 0, **changes: Any) -> Path:
    """Write a run with metrics and two evaluations; returns its folder.

    The fused answers of every other sample are right, those of the others are 0.2 m off or do not parse; of the 2D-only
    answers every fifth is right.
    """
    folder.mkdir(parents=True)
    save_config(report_config(root, folder, **changes), folder / "config.yaml")
    write_metrics(folder, seed)
    for geometry in ("fused", "zero"):
        texts = [answer(sample, index, geometry) for index, sample in enumerate(samples)]
        write_evaluation(folder / "evaluation", root, samples, geometry, texts)
    return folder


def write_metrics(folder: Path, seed: int = 0, steps: int = 60) -> None:
    """Write a metrics.jsonl with the metrics of a real run."""
    generator = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        noise = generator.normal(0, 0.02, 8)
        align = 0.2 + math.exp(-step / 15) + noise[0]
        values = {
            "step": step,
            "loss": align + 0.1,
            "align": align,
            "push": 0.1 + abs(noise[1]),
            "s_short": 0.1 + noise[2],
            "s_fused": 0.5 * (1 - math.exp(-step / 20)) + noise[3],
            "grad_norm": 1 + noise[4],
            "geometry_norm": 0.3 + noise[5],
            "samples_per_s": 12 + noise[6],
            "lr": 1e-3 * (1 - step / steps),
        }
        if step % 20 == 0:
            values |= {"decode_gap": 0.05 + noise[7], "scanrefer/acc@0.25": step / 200}
        lines.append(json.dumps(values))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def answer(sample: Sample, index: int, geometry: str) -> str:
    """The label, a box beside it, or text that does not parse."""
    assert sample.target is not None
    right = index % 2 == 0 if geometry == "fused" else index % 5 == 0
    if right:
        return sample.answer
    if geometry == "fused" and index % 7 == 1:
        return "I cannot find it."
    box = np.array(sample.target.box)
    box[:2] += 0.2 if geometry == "fused" else 0.8
    return camera_answer(sample, frame=parse_grounding(sample.answer, len(sample.frames)).frame, box=box, decimals=2)


def write_evaluation(
    folder: Path, root: Path, samples: Sequence[Sample], geometry: str, texts: Sequence[str], data: str = SET
) -> None:
    """Write the files of ``w2r2 evaluate``."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [record_of(sample, text) for sample, text in zip(samples, texts, strict=True)]
    write_records(folder / f"predictions-scanrefer-{geometry}.jsonl", records)
    scores = {
        "task": "scanrefer",
        "geometry": geometry,
        "checkpoint": "run",
        "run": {"weights": "1234567890", "geometry": geometry, "data": ["0"], "max_new_tokens": 128},
        "data": [{"path": str(root / data), "manifest": "0"}],
        "samples": len(records),
        "of": len(records),
        "protocols": score_records(records),
    }
    (folder / f"scores-scanrefer-{geometry}.json").write_text(json.dumps(scores))


def write_hostile_run(folder: Path, root: Path, samples: Sequence[Sample]) -> Path:
    """A run whose questions, answers, object names, folder and options contain markup."""
    data = "prepared/hostile"
    hostile = [
        replace(
            sample,
            id=f"{sample.id}{MARKUP}",
            question=f"{sample.question}{MARKUP}",
            what=(0, 0),
            target=replace(sample.target, object_name=MARKUP) if sample.target else None,
        )
        for sample in samples[:6]
    ]
    write_prepared(root / data, hostile, root)
    folder = folder / "<b onmouseover=alert(1)>run"
    folder.mkdir(parents=True)
    config = report_config(root, folder, **{"model.vlm": MARKUP, "data.val": f"[{{path: {data}}}]"})
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, f"gap/{MARKUP}": 0.5}) + "\n")
    for geometry in ("fused", "zero"):
        texts = [sample.answer if index % 2 else MARKUP for index, sample in enumerate(hostile)]
        write_evaluation(folder / "evaluation", root, hostile, geometry, texts, data)
    return folder
