"""Rank script of test_sharded.py: LoRA kernels under ZeRO-3, in layers that are leaf modules and that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Layer(nn.Module):
    """Residual layer with two linear projections, in place of a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.second(torch.tanh(self.first(x)))
        return out


class Loss(nn.Module):
    """Two checkpointed layers and a mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


def lora_model(bind: bool) -> Any:
    """`Loss` with LoRA whose B matrices are not zero; with `bind`, its projections use the LoRA kernel."""
    from peft import LoraConfig, get_peft_model

    from w2r2_ds.kernels.lora_linear import bind_lora

    torch.manual_seed(0)
    model: Any = get_peft_model(Loss(), LoraConfig(r=4, target_modules=["first", "second"]))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    for layer in model.base_model.model.layers:
        for module in (layer.first, layer.second):
            if bind:
                bind_lora(module, "torch")
    return model


def work(folder: Path) -> None:
    """Entry point of a rank: write the number of kernel calls and the largest relative gradient difference."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    from w2r2_ds.kernels import lora_linear
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    calls: list[bool] = []
    stock = lora_linear.lora_projection
    lora_linear.lora_projection = lambda *args: (calls.append(True), stock(*args))[1]  # type: ignore[assignment, func-returns-value]
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()  # the same on both ranks
    unsharded = lora_model(False)
    unsharded(x).backward()
    exact = {name: p.grad for name, p in unsharded.named_parameters() if p.requires_grad}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    zero |= {"memory_efficient_linear": False}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    found = {}
    for leaf in (True, False):
        calls.clear()
        model = lora_model(True)
        if leaf:
            set_z3_leaf_modules(model, [Layer])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.backward(engine(x))
        own = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
        difference = max(
            float((own[name] - grad).norm() / grad.norm()) for name, grad in exact.items() if grad is not None
        )
        found["leaf" if leaf else "no leaf"] = [len(calls), difference]
        engine.destroy()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
