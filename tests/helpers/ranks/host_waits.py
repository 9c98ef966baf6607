"""Rank script of test_host_waits.py: count how often a training step makes the host wait for a GPU.

DeepSpeed gets streams and events from its accelerator; that of the CPU has none. `cuda_answers` replaces them by those
of a GPU that is slower than the host: no event is finished when it is queried, so the host waits wherever it can.

`work` reads ``FOLDER/cases.pkl`` and writes ``FOLDER/found.json``.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

STEPS = 4  # DeepSpeed records its trace in step 1, prefetches from step 3 on, and times its throughput from step 3 on
CREATED = ("gather", "reduce")
"""Names of the streams of ZeRO-3, in the order in which it creates them."""
READS = ("item", "tolist", "__float__", "__int__", "__bool__")
"""Methods of a tensor that copy its value to the host."""
READERS = ("/w2r2_ds/training/", "/deepspeed/")
"""Packages whose reads are counted. Others read tensors that are on the host on a GPU machine, too."""


@dataclass
class Stream:
    """A stream of a GPU, which only counts.

    Attributes:
        waits: counter of host waits, by ``stream: function``.
        name: its name there.
    """

    waits: Counter[str]
    name: str

    def synchronize(self) -> None:
        """The host waits for everything that is queued on this stream."""
        count(self.waits, self.name, sys._getframe(1))

    def wait_stream(self, other: Stream) -> None:
        """This stream waits for the other one; the host does not."""


def count(waits: Counter[str], what: str, caller: FrameType) -> None:
    """Count one wait."""
    waits[f"{what}: {caller.f_code.co_name}"] += 1


def counted_read(waits: Counter[str], stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `torch.Tensor` that counts its calls from `READERS`."""

    def read(self: Any, *args: Any) -> Any:
        caller = sys._getframe(1)
        if any(package in caller.f_code.co_filename for package in READERS):
            count(waits, "read", caller)
        return stock(self, *args)

    return read


def accelerator_answers(waits: Counter[str]) -> dict[str, Any]:
    """Methods and properties of an accelerator with streams, as those of CUDA."""
    default = Stream(waits, "compute")
    current, created = [default], iter(CREATED)

    class Event:
        def record(self) -> None:
            self.stream = current[-1]

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            count(waits, self.stream.name, sys._getframe(1))

    @contextlib.contextmanager
    def enter(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    return {
        "is_synchronized_device": lambda self: False,
        "resolves_data_dependency": lambda self: False,
        "handles_memory_backpressure": lambda self: False,
        "use_host_timers": lambda self: True,
        "Stream": property(lambda self: lambda: Stream(waits, next(created))),
        "Event": property(lambda self: Event),
        "stream": lambda self, stream: enter(stream),
        "current_stream": lambda self, device_index=None: current[-1],
        "default_stream": lambda self, device_index=None: default,
        "synchronize": lambda self, device_index=None: count(waits, "device", sys._getframe(1)),
    }


@contextlib.contextmanager
def cuda_answers() -> Iterator[Counter[str]]:
    """Let DeepSpeed's CPU accelerator answer as that of CUDA, for an engine that is made in the block.

    Yields:
        Host waits by ``what: calling function``. `what` is a stream (``compute`` is the default one), ``device`` (all
        streams), or ``read`` (a tensor's value).
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    waits: Counter[str] = Counter()
    changes: list[tuple[Any, str, Any]] = [
        *((type(get_accelerator()), name, answer) for name, answer in accelerator_answers(waits).items()),
        *((torch.Tensor, name, counted_read(waits, getattr(torch.Tensor, name))) for name in READS),
        (torch.Tensor, "record_stream", lambda self, stream: None),
    ]
    stock = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield waits
    finally:
        for owner, name, value in stock:
            setattr(owner, name, value)


def work(folder: Path) -> None:
    """Entry point of a rank: write DeepSpeed configuration -> waits and losses of the last step to found.json."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    from w2r2_ds.models.build import build_model, load_frontend
    from w2r2_ds.training.deepspeed.config import resolve_ds_config
    from w2r2_ds.training.deepspeed.engine import make_engine
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build
    from w2r2_ds.training.fault_tolerance.activity import Activity
    from w2r2_ds.training.optimizer import trained_groups
    from w2r2_ds.training.trainer import train_step
    from zero3_cases import batches_of, step_config

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    case, model_config, samples, ds_configs = pickle.loads((folder / "cases.pkl").read_bytes())
    config, frontend = step_config(case, model_config), load_frontend(model_config)
    batches = batches_of(case, dist.get_rank(), samples, frontend, config)
    sizes = {"global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch}
    device, found = torch.device("cpu"), {}
    for name, raw in ds_configs.items():
        ds_config = resolve_ds_config(raw, path=name, world_size=2, bf16=False, **sizes)
        with cuda_answers() as waits:
            keep_alive = HfDeepSpeedConfig(ds_config)
            model = build_model(config.model, device, 1)
            engine = make_engine(model, frontend, config, ds_config, device)
            del keep_alive
            groups = trained_groups(model)
            run: Any = SimpleNamespace(engine=engine, config=config, device=device, groups=groups, activity=Activity())
            run.gradient_accumulation_steps = engine.gradient_accumulation_steps()
            for step in range(STEPS):
                waits.clear()
                metrics = train_step(run, batches, step)
            found[name] = {
                "waits": dict(waits),
                "loss": metrics["loss"],
                "grad_norm": metrics["grad_norm"],
                "trained": sum(len(parameters) for parameters in groups.values()),
            }
            engine.destroy()
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
