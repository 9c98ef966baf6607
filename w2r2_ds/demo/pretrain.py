"""Pretraining of the demo's tiny VLM: all weights, 2D only.

It stands in for the pretrained VLM of a real run; the answers of a random VLM could not be parsed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from w2r2_ds.config.schema import DemoConfig, RunConfig
from w2r2_ds.data.loader import train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.family import find_family
from w2r2_ds.models.w2r2 import answer_states
from w2r2_ds.types.batch import Batch


def warm_up(
    vlm: Any, frontend: VlmFrontend, samples: Mixture, config: RunConfig, report: Callable[[int, float], None]
) -> None:
    """Train all weights of `vlm` in place on training samples, 2D only, float32, on the CPU.

    Args:
        vlm: tiny VLM.
        frontend: tokenizer and vision spec of the VLM.
        samples: training split.
        config: run configuration; sections `data` and `demo` are used.
        report: function called after every step with its number, from 1, and its loss.
    """
    demo: DemoConfig = config.demo
    sampler = GlobalBatchSampler(
        samples,
        demo.warmup_batch,
        demo.warmup_batch,
        rank=0,
        world_size=1,
        steps=demo.warmup_steps,
        seed=demo.seed,
    )
    torch.manual_seed(demo.seed)
    vlm.train()
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=demo.warmup_lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, demo.warmup_steps // 20, demo.warmup_steps)
    data = replace(config.data, questions_per_scene=1, packing=False)  # padded batches, without groups of samples
    for step, batch in enumerate(train_loader(samples, frontend, data, sampler)):
        loss = answer_loss(vlm, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, float(loss.detach()))
    vlm.eval()


def answer_loss(vlm: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens of a batch, without geometry."""
    family = find_family(vlm.config.model_type)
    states = answer_states(family, vlm, batch, family.encode_visuals(vlm, batch.visuals))
    return cross_entropy(vlm.get_output_embeddings()(states), batch.answer_positions.label)
