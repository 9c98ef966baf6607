"""Finished runs of ablations without training: a checkpoint of a few bytes, and scores of hand-made answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hand_records import beside, camera_answer, grounding
from w2r2_ds.diagnostics.ablation.grid import Grid, arms_of
from w2r2_ds.diagnostics.ablation.plan import Plan, Run, evaluation_folder
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.resumable import write_records
from w2r2_ds.evaluation.scoring import score_records
from w2r2_ds.training.checkpoint.manifest import TENSORS, step_folder, write_manifest
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.hashing import named_sha256

STEPS = 2
CONTENT = b"no weights"
WEIGHTS = named_sha256({TENSORS: hashlib.sha256(CONTENT).hexdigest()})
"""Hash of the weights of `write_checkpoint`."""
FUSED = {"fused": {"geometry": "fused"}}
SCENES = ("scene0011_00", "scene0011_01", "scene0015_00", "scene0025_00", "scene0030_00")
PROTOCOL = "scanrefer/vgllm-direct"


def make_plan(
    out: Path, grids: Sequence[Grid], seeds: Sequence[int] = (0,), baseline: str = "", **changes: Any
) -> Plan:
    """An ablation with one evaluation, `FUSED`."""
    arms = arms_of(grids)
    values: dict[str, Any] = {"deepspeed": "ds_configs/zero3.json", "evaluations": FUSED} | changes
    steps = dict.fromkeys((arm.name for arm in arms), STEPS)
    return Plan(out, ["--config=recipe.yaml"], steps, arms, seeds, baseline or arms[0].name, **values)


def write_checkpoint(run: Path, step: int = STEPS, data: str = "train", vlm: str = "vlm") -> Path:
    """Write a checkpoint without weights, trained on data with the digest `data` from the VLM `vlm`; returns it."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / TENSORS).write_bytes(CONTENT)
    manifest = {"step": step, "data": [data], "model": {"vlm_weights": vlm}}
    write_manifest(folder, manifest, {TENSORS: atomic_io.digest(folder / TENSORS)})
    return folder


def scene_of(index: int) -> str:
    """Scene of a sample: the first two samples share one."""
    return SCENES[max(0, index - 1)]


def write_scores(
    folder: Path, hits: Sequence[bool], data: str = "val", weights: str = WEIGHTS, path: str = "prepared/val"
) -> None:
    """Write predictions and scores of ScanRefer samples, the first two of one scene; a hit has IoU 1, others 0.

    Args:
        folder: folder of the evaluation.
        hits: whether each answer is right.
        data: digest of the prepared set.
        weights: digest of the trained weights.
        path: folder of the prepared set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, hit in enumerate(hits):
        sample = grounding(ann=str(index), scene=scene_of(index))
        box = None if hit else beside(9.0)
        records.append(record_of(sample, camera_answer(sample, box=box, decimals=9)))
    write_records(folder / "predictions-scanrefer-fused.jsonl", records)
    protocols = score_records(records, [PROTOCOL])
    scores = {
        "run": {"weights": weights},
        "data": [{"path": path, "manifest": data}],
        "protocols": protocols,
    }
    (folder / "scores-scanrefer-fused.json").write_text(json.dumps(scores))


def finish(plan: Plan, hits: Mapping[str, Sequence[Sequence[bool]]]) -> None:
    """Write checkpoints and scores of runs.

    Args:
        plan: the ablation.
        hits: arm -> per seed, whether each sample is a hit. Runs of other arms and seeds stay unfinished.
    """
    for run in plan.runs:
        by_seed = hits.get(run.arm.name, [])
        index = list(plan.seeds).index(run.seed)
        if index < len(by_seed):
            finish_run(run, by_seed[index])


def finish_run(run: Run, hits: Sequence[bool]) -> None:
    """Write the checkpoint and the scores of one run."""
    write_checkpoint(run.folder)
    write_scores(evaluation_folder(run, "fused"), hits)


def differences(arm: Sequence[Sequence[bool]], base: Sequence[Sequence[bool]]) -> np.ndarray:
    """``[seeds, samples]`` differences of hits."""
    return np.array(arm, dtype=float) - np.array(base, dtype=float)
