"""Evaluate a checkpoint or an exported adapter: predictions as JSONL, scores as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from w2r2_ds.config import RunConfig, relocated
from w2r2_ds.config import load_config as load_run_config
from w2r2_ds.data.check import check_frames
from w2r2_ds.data.loading import load_mixture, prompt_loader
from w2r2_ds.data.sample import Sample
from w2r2_ds.engine.checkpoint import find_checkpoint, load_trainable
from w2r2_ds.evaluation import scanrefer
from w2r2_ds.evaluation.generate import generate_answers
from w2r2_ds.export.adapter import ADAPTER_CARD, adapter_config, load_adapter
from w2r2_ds.models.build import Front, build_model, load_front
from w2r2_ds.models.w2r2 import W2R2


def load_model(
    path: Path, root: str | Path | None = None, vlm: str | None = None, vggt: str | None = None
) -> tuple[RunConfig, W2R2, Front]:
    """Model and configuration of a run, a checkpoint or an exported adapter.

    Args:
        path: of one of them.
        root: where the data lie now; where they lay in training without it.
        vlm: likewise the video LLM's directory, or a hub id.
        vggt: likewise VGGT's.

    Raises:
        ValueError: there is no such thing, or it belongs to other models than these.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / ADAPTER_CARD).is_file():
        config = relocated(adapter_config(path), root, vlm, vggt)
        model = load_adapter(path, config, device)
    else:
        checkpoint = find_checkpoint(path)
        config = relocated(load_run_config(checkpoint / "config.yaml"), root, vlm, vggt)
        model = build_model(config.model, device, config.train.seed)
        load_trainable(checkpoint, model)
    return config, model.to(device).eval(), load_front(config.model)


def evaluate(
    path: Path,
    out: Path,
    geometry: str = "fused",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    limit: int = 0,
    *,
    root: str | Path | None = None,
    vlm: str | None = None,
    vggt: str | None = None,
) -> dict[str, Any]:
    """Answer the validation split and score it.

    Args:
        path: run, checkpoint or exported adapter.
        out: folder for `predictions-GEOMETRY.jsonl` and `scores-GEOMETRY.json`.
        geometry: fused, or zero for the 2D-only pass.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
        limit: number of samples, 0 for all.
        root: where the data lie now; where they lay in training without it.
        vlm: likewise the video LLM's directory, or a hub id.
        vggt: likewise VGGT's.

    Returns:
        The scores, as written.
    """
    for option, value, least in (
        ("limit", limit, 0),
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"--{option} is {value}; it must be at least {least}.")
    config, model, front = load_model(path, root, vlm, vggt)
    mixture = load_mixture(config.data, "val")
    samples = mixture[: limit or len(mixture)]
    check_frames(samples)
    records = predict(model, front, config, samples, geometry, batch_size, max_new_tokens)
    scores = scanrefer.summarise(records) | {"task": "scanrefer", "geometry": geometry, "checkpoint": str(path)}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"predictions-{geometry}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (out / f"scores-{geometry}.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def predict(
    model: W2R2,
    front: Front,
    config: RunConfig,
    samples: Sequence[Sample],
    geometry: str,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """One scored record per sample, in order; the text is kept so that it can be scored again without the model."""
    loader = prompt_loader(samples, front, config.data, batch_size)
    answers = generate_answers(model, loader, front.tokenizer, geometry, max_new_tokens, config.data.video_fps)
    records = []
    for sample, (identity, tokens, text) in zip(samples, answers, strict=True):
        assert identity == sample.id, "answers come in the order of the samples"
        records.append({**scanrefer.score_prediction(text, sample), "tokens": tokens})
    return records
