"""Whether configuration and DeepSpeed JSON fit together and this number of ranks; what they will make the run use."""

from __future__ import annotations

import os
from typing import Any

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.doctor.result import CheckResult

NETWORK = ("NCCL_", "GLOO_", "FI_", "UCX_")
"""Beginnings of environment variables that decide about the network."""


def needed_packages(config: RunConfig | None) -> frozenset[str]:
    """Optional packages that a run cannot do without."""
    if config is None:
        return frozenset()
    wanted = {
        "wandb": config.train.wandb,
        "tensorboard": config.train.tensorboard,
        "flash-attn": config.model.attention == "flash_attention_2",
        "triton": config.model.kernels == "triton",
        "liger-kernel": config.model.kernels == "triton",
    }
    return frozenset(name for name, used in wanted.items() if used)


def check_settings(config: RunConfig, ds_path: str, world: int) -> CheckResult:
    """What training refuses at its start, refused here: the push term, the JSON, batch sizes for this many ranks."""
    from w2r2_ds.objective.push_terms import find_push_term
    from w2r2_ds.training.deepspeed.config import load_ds_config, resolve_ds_config

    outcome = CheckResult()
    try:
        find_push_term(config.objective.push)
    except ValueError as error:
        outcome.wrong.append(str(error))
    if not ds_path:
        return outcome
    try:
        resolved = resolve_ds_config(
            load_ds_config(ds_path),
            path=ds_path,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world,
            bf16=dtype_name(config) == "bfloat16",
        )
    except ValueError as error:
        outcome.wrong.append(str(error))
        return outcome
    outcome.shown["ZeRO"] = zero(resolved.get("zero_optimization", {}))
    outcome.shown["global batch"] = (
        f"{config.train.global_batch} = {config.train.micro_batch} x {world} ranks x "
        f"{resolved['gradient_accumulation_steps']} accumulation steps"
    )
    return outcome


def zero(section: dict[str, Any]) -> str:
    """Stage and offload of a DeepSpeed JSON in a few words."""
    text = f"stage {section.get('stage', 0)}"
    for name in ("offload_param", "offload_optimizer"):
        device = section.get(name, {}).get("device", "none")
        if device != "none":
            text += f", {name} to {device}"
    if section.get("zero_hpz_partition_size", 1) > 1:
        text += f", weights kept within {section['zero_hpz_partition_size']} ranks (hpZ)"
    return text


def check_use(config: RunConfig | None) -> CheckResult:
    """Precision, attention and network of a run on this node.

    Args:
        config: None for no run, then only what the environment decides.
    """
    import torch

    from w2r2_ds.kernels.select import resolve_attention, resolve_dtype, resolve_kernels

    outcome = CheckResult()
    gpu = torch.cuda.is_available()
    for name, value in sorted(os.environ.items()):
        if name.startswith(NETWORK):
            outcome.shown[name] = value
            outcome.equal[name] = value
    outcome.shown["backend"] = "NCCL" if gpu else "gloo"
    if os.environ.get("DS_ACCELERATOR"):
        outcome.shown["DS_ACCELERATOR"] = os.environ["DS_ACCELERATOR"]
    if config is None:
        return outcome
    dtype = dtype_name(config)
    outcome.shown["precision"] = f"{dtype} (model.dtype {config.model.dtype})"
    outcome.equal["precision"] = dtype
    if gpu and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        outcome.wrong.append(
            f"model.dtype is bfloat16, which {torch.cuda.get_device_name()} does not compute; take GPUs of the Ampere "
            "generation or later, or --model.dtype float32."
        )
    attention = resolve_attention(config.model.attention, resolve_dtype(config.model.dtype))
    outcome.shown["attention"] = f"{attention} (model.attention {config.model.attention})"
    if config.model.attention.startswith("flash_attention") and not gpu:
        outcome.wrong.append(
            f"model.attention is {config.model.attention}, which needs a GPU; give --model.attention sdpa."
        )
    try:
        kernels = resolve_kernels(config.model.kernels)
        outcome.shown["kernels"] = f"{kernels} (model.kernels {config.model.kernels})"
        outcome.equal["kernels"] = kernels
    except ValueError as error:
        outcome.wrong.append(str(error))
    outcome.equal["attention"] = attention
    return outcome


def dtype_name(config: RunConfig) -> str:
    """`model.dtype` on this machine, by name."""
    from w2r2_ds.kernels.select import resolve_dtype

    return str(resolve_dtype(config.model.dtype)).removeprefix("torch.")
