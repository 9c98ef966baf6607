"""Optimizer and learning rate schedule: AdamW over two parameter groups, cosine schedule with warm-up."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from w2r2_ds.config.schema import TrainConfig
from w2r2_ds.models.build import trainable
from w2r2_ds.models.w2r2 import W2R2


def make_optimizer(model: W2R2, train: TrainConfig) -> AdamW:
    """AdamW with a learning rate per parameter group: `train.lr` for LoRA, `train.merger_lr` for the geometry."""
    learning_rates = {"lora": train.lr, "geometry": train.merger_lr}
    groups = [{"params": parameters, "lr": learning_rates[name]} for name, parameters in trained_groups(model).items()]
    return AdamW(groups, weight_decay=train.weight_decay)


def make_lr_scheduler(optimizer: AdamW, train: TrainConfig) -> LambdaLR:
    """Linear warm-up over `train.warmup_ratio` of the steps, then a cosine to 0 at `train.steps`."""
    return get_cosine_schedule_with_warmup(optimizer, int(train.warmup_ratio * train.steps), train.steps)


def trained_groups(model: W2R2) -> dict[str, list[nn.Parameter]]:
    """The parameters that train: ``lora``, and ``geometry`` (merger and fusion)."""
    geometry = [parameter for module in model.geometry_modules().values() for parameter in module.parameters()]
    groups = {"lora": list(trainable(model.vlm).values()), "geometry": geometry}
    # DeepSpeed drops an empty parameter group; the schedule would then raise, because the number of groups differs.
    assert all(groups.values()), "both groups train"
    return groups
