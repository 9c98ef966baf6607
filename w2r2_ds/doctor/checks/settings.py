"""Checks of the configuration and the DeepSpeed JSON for this number of ranks, precision, attention and kernels."""

from __future__ import annotations

import os
from typing import Any

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.doctor.result import CheckResult

NETWORK = ("NCCL_", "GLOO_", "FI_", "UCX_")
"""Prefixes of environment variables that configure the network."""


def needed_packages(config: RunConfig | None) -> frozenset[str]:
    """Names of the optional packages that a configuration uses."""
    from w2r2_ds.training.trackers import TRACKER_PACKAGES

    if config is None:
        return frozenset()
    uses = {
        **{package: name in config.train.trackers for name, package in TRACKER_PACKAGES.items()},
        "flash-attn": config.model.attention == "flash_attention_2",
        "triton": config.model.kernels == "triton",
        "liger-kernel": config.model.kernels == "triton",
    }
    return frozenset(name for name, used in uses.items() if used)


def check_settings(config: RunConfig, ds_path: str, world: int) -> CheckResult:
    """Check push term, DeepSpeed JSON (if any) and batch sizes for `world` ranks with the functions of training."""
    from w2r2_ds.objective.push_terms import check_push_term
    from w2r2_ds.training.deepspeed.config import load_ds_config, resolve_ds_config

    result = CheckResult()
    try:
        check_push_term(config)
    except ValueError as error:
        result.errors.append(str(error))
    if not ds_path:
        return result
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
        result.errors.append(str(error))
        return result
    result.info["ZeRO"] = describe_zero(resolved.get("zero_optimization", {}))
    result.info["global batch"] = (
        f"{config.train.global_batch} = {config.train.micro_batch} x {world} ranks x "
        f"{resolved['gradient_accumulation_steps']} accumulation steps"
    )
    return result


def describe_zero(section: dict[str, Any]) -> str:
    """Describe ZeRO stage, offload and hpZ of the section `zero_optimization` in one line."""
    text = f"stage {section.get('stage', 0)}"
    for name in ("offload_param", "offload_optimizer"):
        device = section.get(name, {}).get("device", "none")
        if device != "none":
            text += f", {name} to {device}"
    if section.get("zero_hpz_partition_size", 1) > 1:
        text += f", weights kept within {section['zero_hpz_partition_size']} ranks (hpZ)"
    return text


def check_precision(config: RunConfig | None) -> CheckResult:
    """Check precision, attention and kernels of a run, if any; list the environment variables of the network."""
    import torch

    from w2r2_ds.kernels.select import describe_attention, describe_kernels, resolve_attention, resolve_dtype

    result = CheckResult()
    gpu = torch.cuda.is_available()
    for name, value in sorted(os.environ.items()):
        if name.startswith(NETWORK):
            result.info[name] = value
            result.must_match[name] = value
    result.info["backend"] = "NCCL" if gpu else "gloo"
    if config is None:
        return result
    dtype = dtype_name(config)
    result.info["precision"] = f"{dtype} (model.dtype {config.model.dtype})"
    result.must_match["precision"] = dtype
    if gpu and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        result.errors.append(
            f"model.dtype is bfloat16, which {torch.cuda.get_device_name()} does not support; use GPUs of the "
            "Ampere generation or later, or --model.dtype float32."
        )
    attention = resolve_attention(config.model.attention, resolve_dtype(config.model.dtype))
    try:
        described = describe_attention(config.model.attention, resolve_dtype(config.model.dtype))
        result.info["attention"] = described.removeprefix("attention: ")
    except ValueError as error:
        result.errors.append(str(error))
    try:
        kernels = describe_kernels(config.model.kernels)
        result.info["kernels"] = f"{kernels} (model.kernels {config.model.kernels})"
        result.must_match["kernels"] = kernels
    except ValueError as error:
        result.errors.append(str(error))
    result.must_match["attention"] = attention
    return result


def dtype_name(config: RunConfig) -> str:
    """`model.dtype` resolved on this machine: "bfloat16" or "float32"."""
    from w2r2_ds.kernels.select import resolve_dtype

    return str(resolve_dtype(config.model.dtype)).removeprefix("torch.")
