"""Wrap the training step in DeepSpeed: activation checkpointing, ZeRO-3 leaf modules, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import set_z3_leaf_modules
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.answer_tokens import token_tables
from w2r2_ds.models.build import VlmFrontend
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.deepspeed.whole_tower import keep_tower_whole
from w2r2_ds.training.optimizer import make_lr_scheduler, make_optimizer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.utils.sanitize import one_line

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


ENVIRONMENT_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError, OSError)
"""Exceptions that are not caused by the JSON: memory, GPUs, network and files."""


def make_engine(
    model: W2R2,
    frontend: VlmFrontend,
    config: RunConfig,
    ds_config: dict[str, Any],
    device: torch.device,
    leaf_modules: Sequence[type[nn.Module]] | None = None,
    ds_path: str | Path = "the DeepSpeed JSON",
) -> DeepSpeedEngine:
    """The engine around `W2R2Step`, with AdamW and a cosine schedule over two parameter groups.

    Args:
        model: the composed model; under ZeRO-3 with partitioned weights.
        frontend: the VLM's tokenizer.
        config: run configuration.
        ds_config: result of `resolve_ds_config`.
        device: this rank's device.
        leaf_modules: classes whose modules ZeRO-3 gathers whole; by default `zero3_leaf_modules`.
        ds_path: the DeepSpeed JSON, for messages.

    Raises:
        ValueError: DeepSpeed does not accept a setting of the JSON.
    """
    vocabulary = model.base.config.get_text_config().vocab_size
    tables = token_tables(frontend.tokenizer, vocabulary).to(device)
    scorer = Scorer(tables, frontend.tokenizer, config.objective)
    zero3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    if zero3:
        release_base_weights(model.family.language_model(model.base))
        if not config.train.shard_vision_tower:
            keep_tower_whole(model, device)
    step = W2R2Step(model, config, scorer, zero3)
    step.train()
    if config.train.activation_checkpointing:
        # Before `deepspeed.initialize`: the layers' forwards are replaced, then ZeRO-3's hooks are registered.
        every, offload = config.train.recompute_every, config.train.offload_activations
        recompute(model.family.language_model(model.base).layers, every, offload, step.recompute_context_fn)
    # ZeRO-3 releases a module's weights after its backward, in a hook on the gradients of its inputs. The output of the
    # frozen embedding has no gradient, so without this the hook of the first layer would not run.
    model.base.enable_input_require_grads()
    if leaf_modules is None:
        leaf_modules = zero3_leaf_modules(model, step.push_term.stop_gradient, config.train.shard_vision_tower)
    if leaf_modules:
        set_z3_leaf_modules(model, list(leaf_modules))
    optimizer = make_optimizer(model, config.train)
    schedule = make_lr_scheduler(optimizer, config.train)
    # The optimizer has trained parameters only, so ZeRO makes master weights and moments for these only.
    return initialize(ds_path, model=step, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)


def initialize(ds_path: str | Path, **arguments: Any) -> DeepSpeedEngine:
    """`deepspeed.initialize`; errors name the JSON.

    Args:
        ds_path: the DeepSpeed JSON, for messages.
        **arguments: those of `deepspeed.initialize`.

    Raises:
        ValueError: DeepSpeed does not accept a setting of the JSON. It raises many types of exceptions for that, such
            as AssertionError or RuntimeError.
    """
    try:
        engine, *_ = deepspeed.initialize(**arguments)
    except ENVIRONMENT_ERRORS:
        raise
    except Exception as error:
        if "gloo" in str(error):  # a lost connection: gloo's errors have no type of their own
            raise
        reason = f"{type(error).__name__}: {one_line(' '.join(str(error).split()))}"
        raise ValueError(f"{ds_path}: DeepSpeed does not accept a setting of this file ({reason}).") from error
    return engine


def zero3_leaf_modules(model: W2R2, stop_gradient: bool, tower: bool = True) -> list[type[nn.Module]]:
    """Classes whose modules ZeRO-3 gathers whole: one fetch per block instead of one per Linear.

    Args:
        model: the composed model.
        stop_gradient: whether the shortcut pass has no graph. Otherwise decoder layers cannot be leaf modules: a leaf
            reduces its gradients at every backward call, and two graphs are two calls.
        tower: whether the vision tower is sharded.
    """
    decoder_layer = type(model.family.language_model(model.base).layers[0])
    tower_block = type(model.family.tower_blocks(model.base)[0])
    return [tower_block] * tower + [decoder_layer] * stop_gradient


def release_base_weights(language_model: nn.Module) -> None:
    """Let ZeRO-3 free the frozen weights of LoRA projections between forward and backward pass, in place.

    The graph of `torch.nn.functional.linear` keeps a view of the gathered weight until the backward pass: the whole
    model, if no layer is recomputed. DeepSpeed's function saves the parameter instead, whose data ZeRO-3 frees and
    gathers again. DeepSpeed would replace `torch.nn.functional.linear` itself, for all models of the process, and
    VGGT's features would be rounded differently: see `memory_efficient_linear` in `config.py`.
    """
    bases = (module.base_layer for module in language_model.modules() if isinstance(module, LoraLinear))
    linears: list[Any] = [base for base in bases if isinstance(base, nn.Linear)]
    for linear in linears:
        linear.forward = MethodType(_zero3_linear, linear)


def _zero3_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Forward of `nn.Linear` whose graph does not keep the weight's data."""
    product: Tensor = zero3_linear_wrap(x, module.weight, module.bias)
    return product
