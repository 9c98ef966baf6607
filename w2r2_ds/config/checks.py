"""Values of the run configuration that cannot work are refused by name, before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from w2r2_ds.config.safe_yaml import refuse_texts

if TYPE_CHECKING:
    from w2r2_ds.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """Refuse values that cannot work, by name, before anything is loaded."""
    refuse_texts(asdict(config))
    if not re.fullmatch(r"\w+", config.model.attention):  # transformers takes OWNER/NAME for code on the hub
        raise ValueError(
            f"model.attention is {config.model.attention!r}; it is the name of an implementation such as sdpa or "
            "flash_attention_2, never code of the Hugging Face Hub."
        )
    positive = {
        "data.frame_width": config.data.frame_width,
        "data.video_fps": config.data.video_fps,
        "data.questions_per_scene": config.data.questions_per_scene,
        "data.prefetch": config.data.prefetch,
        "data.cache_gib": config.data.cache_gib,
        "model.lora_rank": config.model.lora_rank,
        "model.merger_hidden": config.model.merger_hidden,
        "train.steps": config.train.steps,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.save_every": config.train.save_every,
        "train.keep_last": config.train.keep_last,
        "train.recompute_every": config.train.recompute_every,
        "train.eval_samples": config.train.eval_samples,
        "train.eval_max_new_tokens": config.train.eval_max_new_tokens,
        "train.lr": config.train.lr,
        "train.hang_seconds": config.train.hang_seconds,
        "train.merger_lr": config.train.merger_lr,
        "demo.frames": config.demo.frames,
        "demo.warmup_steps": config.demo.warmup_steps,
        "objective.gap_samples": config.objective.gap_samples,
        "demo.warmup_batch": config.demo.warmup_batch,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be greater than 0.")
    if not math.isfinite(config.data.cache_gib):
        raise ValueError(f"data.cache_gib is {config.data.cache_gib}; give a number of GiB.")
    if config.data.cached_features != "geometry" and not config.data.cache:
        raise ValueError(
            f"data.cached_features is {config.data.cached_features}, but data.cache is empty; name the cache's folder."
        )
    not_negative = {
        "data.workers": config.data.workers,
        "train.seed": config.train.seed,
        "train.eval_every": config.train.eval_every,
        "objective.margin": config.objective.margin,
        "objective.iou_margin": config.objective.iou_margin,
        "objective.gap_every": config.objective.gap_every,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it cannot be negative.")
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one prepared data set.")
    for source in config.data.train:
        if source.weight <= 0 or source.cap < 0:
            raise ValueError(
                f"data.train: {source.path} has weight {source.weight} and cap {source.cap}; a weight is "
                "greater than 0, a cap is not negative."
            )
    together = config.data.questions_per_scene
    if config.train.micro_batch % together:
        raise ValueError(
            f"train.micro_batch is {config.train.micro_batch}, no multiple of data.questions_per_scene {together}: "
            f"questions that share frames are in one micro-batch; give a multiple."
        )
    if together > 1 and config.objective.visual_mask_ratio:
        raise ValueError(
            f"objective.visual_mask_ratio is {config.objective.visual_mask_ratio}: it masks every sample's frames by "
            f"themselves, but data.questions_per_scene {together} shares them; set one of the two to its default."
        )
    if config.train.eval_every and not config.data.val:
        raise ValueError("data.val is empty, but train.eval_every is not 0; name a validation set, or give 0.")
    if not config.train.activation_checkpointing:
        for name, idle in (("recompute_every", 1), ("offload_activations", False)):
            if (value := getattr(config.train, name)) != idle:
                raise ValueError(
                    f"train.{name} is {value}, but train.activation_checkpointing is false, so that nothing is "
                    "recomputed; set it to true."
                )
    if not config.out:
        raise ValueError("out is empty; name the folder of the run.")
    if not 0 <= config.objective.mu < 1:
        raise ValueError(f"objective.mu is {config.objective.mu}; a similarity threshold lies in [0, 1).")
    if not -1 <= config.objective.cosine <= 1:
        raise ValueError(f"objective.cosine is {config.objective.cosine}; a cosine lies in [-1, 1].")
    if not 0 <= config.objective.visual_mask_ratio < 1:
        raise ValueError(f"objective.visual_mask_ratio is {config.objective.visual_mask_ratio}; a share in [0, 1).")
    if config.objective.lambda_det < 0:
        raise ValueError(
            f"objective.lambda_det is {config.objective.lambda_det}; the weight of the push term cannot be negative."
        )
    if not 0 <= config.train.warmup_ratio < 1:
        raise ValueError(f"train.warmup_ratio is {config.train.warmup_ratio}; it is a share of the steps in [0, 1).")
    if not 0 <= config.model.lora_dropout < 1:
        raise ValueError(f"model.lora_dropout is {config.model.lora_dropout}; it must be in [0, 1).")
    if config.train.pass_order == "lockstep" and config.objective.push == "unblocked":
        raise ValueError(
            "train.pass_order is lockstep, which keeps no graph of the shortcut pass, but objective.push unblocked "
            "needs "
            "it; choose train.pass_order sequential, or auto."
        )
