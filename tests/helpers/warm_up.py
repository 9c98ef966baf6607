"""The models of the tests' world: a random tiny VGGT, and a tiny VLM whose weights are trained for some steps, 2D only.

Without these steps, its answers would not parse.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.loader import train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.tasks.base import TASKS, TaskOptions
from w2r2_ds.demo.tiny_models import build_tiny_vggt, build_tiny_vlm
from w2r2_ds.models.build import VlmFrontend, load_frontend
from w2r2_ds.models.family import find_family
from w2r2_ds.models.w2r2 import answer_states
from w2r2_ds.models.weights.loading import load_vlm
from w2r2_ds.types.batch import Batch

SEED, STEPS, BATCH, LEARNING_RATE = 0, 100, 8, 3e-3


def prepare_tiny_sets(config: RunConfig) -> None:
    """Prepare the sets ``prepared/TASK/SPLIT`` of `data.train` and `data.val` in the task's first format."""
    root = Path(config.data.root)
    for source in (*config.data.train, *config.data.val):
        task, split = source.path.split("/")[1:]
        frames = FrameOptions("uniform", config.demo.frames)
        formats = TASKS[task].formats
        options = TaskOptions(task, split, formats[0], frames, visibility="depth", step=1, windows=10)
        prepare(root, options, root / source.path, quiet=True)


def make_tiny_models(config: RunConfig) -> None:
    """Write `model.vlm` and `model.geometry.path`, or reuse them."""
    vlm, vggt = Path(config.model.vlm), Path(config.model.geometry.path)
    if vlm.exists():
        return
    # Renamed at the end, so that a folder of this name is complete.
    partial = vlm.with_name(vlm.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    samples = load_mixture(config.data, "train")
    build_tiny_vlm(partial, [f"{sample.question}\n{sample.answer}" for sample in samples], SEED)
    build_tiny_vggt(vggt, SEED)
    model = load_vlm(str(partial), torch.float32, "sdpa")
    warm_up(model, load_frontend(replace(config.model, vlm=str(partial))), samples, config)
    model.save_pretrained(partial)
    partial.rename(vlm)


def warm_up(vlm: Any, frontend: VlmFrontend, samples: Mixture, config: RunConfig) -> None:
    """Train all weights of `vlm` in place on training samples, 2D only, float32, on the CPU.

    Args:
        vlm: tiny VLM.
        frontend: tokenizer and vision spec of the VLM.
        samples: training split.
        config: run configuration; the section `data` is used.
    """
    sampler = GlobalBatchSampler(samples, BATCH, BATCH, rank=0, world_size=1, steps=STEPS, seed=SEED)
    torch.manual_seed(SEED)
    vlm.train()
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    data = replace(config.data, questions_per_scene=1, packing=False)  # padded batches, without groups of samples
    for batch in train_loader(samples, frontend, data, sampler):
        answer_loss(vlm, batch).backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    vlm.eval()


def answer_loss(vlm: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens of a batch, without geometry."""
    family = find_family(vlm.config.model_type)
    states = answer_states(family, vlm, batch, family.encode_visuals(vlm, batch.visuals))
    return cross_entropy(vlm.get_output_embeddings()(states), batch.answer_positions.label)
