"""The demo's stand-in for pre-training: full-weight steps of the tiny VLM on 2D input.

A user brings a pretrained VLM; the demo has none, and without this an untrained one answers nothing that parses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from w2r2_ds.config import DemoConfig, RunConfig
from w2r2_ds.data.collate import Batch
from w2r2_ds.data.loading import checked, load_samples, train_loader
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.models.build import Front


def warm_up(vlm: Any, front: Front, config: RunConfig, report: Callable[[int, float], None]) -> None:
    """Train all weights of `vlm` in place on the training split, 2D only, float32, on the CPU.

    Args:
        vlm: tiny VLM.
        front: its tokenizer and vision facts.
        config: data and `demo.*`.
        report: called with step and loss.
    """
    demo: DemoConfig = config.demo
    samples, _ = load_samples(config.data, "train")
    sampler = GlobalBatchSampler(
        len(samples),
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
    for step, batch in enumerate(checked(train_loader(samples, front, config.data, sampler))):
        loss = answer_loss(vlm, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step + 1, float(loss.detach()))
    vlm.eval()


def answer_loss(vlm: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens of a batch, from frames and question."""
    kind = batch.visuals.kind
    encode = vlm.model.get_video_features if kind == "video" else vlm.model.get_image_features
    visual = encode(batch.visuals.pixel_values, batch.visuals.grid_thw, return_dict=True)
    states = vlm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        mm_encoder_outputs={kind: visual},
        use_cache=False,
    ).last_hidden_state
    rows = batch.answer_rows
    return cross_entropy(vlm.lm_head(states[rows.sample, rows.position]), rows.label)
