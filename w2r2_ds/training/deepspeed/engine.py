"""The model in DeepSpeed's engine: what is gathered whole, what is recomputed, two groups with a learning rate each."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from transformers import get_cosine_schedule_with_warmup

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.answer_tokens import token_tables
from w2r2_ds.models.build import VlmFrontend, trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step


def make_engine(
    model: W2R2, frontend: VlmFrontend, config: RunConfig, ds_config: dict[str, Any], device: torch.device
) -> Any:
    """Wrap the step in DeepSpeed, with AdamW and a cosine schedule over two parameter groups."""
    decoder_layer = type(model.base.model.language_model.layers[0])
    rows = model.base.config.get_text_config().vocab_size
    scorer = Scorer(token_tables(frontend.tokenizer, rows).to(device), frontend.tokenizer, config.objective)
    zero3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    step = W2R2Step(model, config, scorer, zero3)
    step.train()
    if config.train.activation_checkpointing:
        every, offload = config.train.recompute_every, config.train.offload_activations
        recompute(model.base.model.language_model.layers, every, offload, step.checkpoint_contexts)
    # Decoder layers are gathered whole; DeepSpeed then needs their input to require grad.
    model.base.enable_input_require_grads()
    if find_push_term(config.objective.push).blocked:  # a leaf with two graphs would reduce its gradients twice
        set_z3_leaf_modules(model, [decoder_layer])
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.train.weight_decay)
    steps = config.train.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.train.warmup_ratio * steps), steps)
    engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    return engine


def trained_groups(model: W2R2) -> dict[str, list[torch.nn.Parameter]]:
    """LoRA, and geometry (merger and fusion); none is empty, which would break DeepSpeed."""
    geometry = [parameter for module in model.geometry_modules().values() for parameter in module.parameters()]
    groups = {"lora": list(trainable(model.vlm).values()), "geometry": geometry}
    assert all(groups.values()), "both groups train"
    return groups


def parameter_groups(model: W2R2, config: RunConfig) -> list[dict[str, Any]]:
    """The trained groups with a learning rate each."""
    rates = {"lora": config.train.lr, "geometry": config.train.merger_lr}
    return [{"params": parameters, "lr": rates[name]} for name, parameters in trained_groups(model).items()]
