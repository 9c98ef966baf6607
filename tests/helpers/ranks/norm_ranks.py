"""Rank script of test_gradient_norms.py: norms per group with every ZeRO stage, and norms from each whole gradient.

It also accumulates gradients that bfloat16 cannot add. `work` reads ``FOLDER/configs.json`` and writes
``FOLDER/rankN.json``.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

WIDTHS = (7, 5, 11, 3, 1)
"""Odd sizes: partitions are padded, and tensors are cut between ranks."""
MICRO_BATCHES = 3


def make_groups() -> tuple[Any, dict[str, list[Any]]]:
    """A small network, and its weights and biases as two groups; one weight gets no gradient."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(first, second) for first, second in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(*layers)
    model.unused = nn.Parameter(torch.ones(4))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x).tanh()).tanh()).tanh()).square().mean()
    weights = [layer.weight for layer in layers] + [model.unused]
    return model, {"weights": weights, "biases": [layer.bias for layer in layers]}


def accumulated(config: dict[str, Any]) -> tuple[list[float], str]:
    """The sum of gradients 256, 1, 1, ... of one parameter in a bfloat16 model, and the dtype of DeepSpeed's buffer."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_grad
    from torch import nn

    model = nn.Linear(2, 1, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    steps = config["gradient_accumulation_steps"]
    for step in range(steps):
        gradient = 256.0 if step == 0 else 1.0
        x = torch.full((1, 2), steps * gradient, dtype=torch.bfloat16)  # DeepSpeed divides by the number of steps
        engine.backward(engine(x).sum())
        if step == steps - 1:
            total = safe_get_full_grad(model.weight).flatten().tolist()
            dtype = str(engine.optimizer.averaged_gradients[0][0].dtype)
        engine.step()
    engine.destroy()
    return total, dtype


def work(folder: Path) -> None:
    """Entry point of a rank."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad
    from torch.utils._python_dispatch import TorchDispatchMode

    from w2r2_ds.training.deepspeed import gradient_norms
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build

    class Operations(TorchDispatchMode):
        """Counts the operations that run in the block, in place of a GPU's kernel launches."""

        number = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    rank, found = dist.get_rank(), {}
    stock, reductions = dist.all_reduce, [0]

    def counted(*args: Any, **given: Any) -> Any:
        reductions[0] += 1
        return stock(*args, **given)

    configs, accumulations = json.loads((folder / "configs.json").read_text())
    for name, config in configs.items():
        model, groups = make_groups()
        model = model.bfloat16() if config["bf16"]["enabled"] else model
        optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        generator, steps = torch.Generator().manual_seed(rank), []
        for _ in range(2):
            for micro_batch in range(MICRO_BATCHES):
                x = torch.randn(6, WIDTHS[0], generator=generator).to(next(model.parameters()).dtype)
                engine.backward(engine(x))
                if micro_batch == MICRO_BATCHES - 1:
                    dist.all_reduce, reductions[0] = counted, 0
                    with Operations() as operations:
                        norms = gradient_norms.group_norms(engine, groups, torch.device("cpu"))
                    dist.all_reduce = stock
                    whole = {}
                    for group, parameters in groups.items():
                        gradients = [g for p in parameters if (g := safe_get_full_grad(p)) is not None]
                        squares = sum(float(gradient.double().square().sum()) for gradient in gradients)
                        whole[f"grad_norm_{group}"] = squares**0.5
                    steps.append([norms, whole, operations.number, reductions[0]])
                engine.step()
        found[name] = steps
        engine.destroy()
    found["accumulated"] = {name: accumulated(config) for name, config in accumulations.items()}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
