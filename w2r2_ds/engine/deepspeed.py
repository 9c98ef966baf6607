"""The DeepSpeed JSON: read strictly, "auto" filled from the run's configuration, contradictions refused; the start.

The JSON is the one place for ZeRO, precision, offload and clipping; batch sizes, optimizer, schedule and logging
belong to the run's configuration.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from w2r2_ds.engine.ds_sections import check_sections, unknown
from w2r2_ds.engine.hierarchy import fill_hierarchy, ranks_per_machine

AUTO = "auto"

KNOWN = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "bf16",
        "fp16",
        "gradient_clipping",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "data_types",
        "checkpoint",
        "aio",
        "comms_logger",
        "flops_profiler",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "log_level",
    }
)
"""DeepSpeed's top-level keys that change something here and leave the rest of the project right."""

REFUSED = {
    "optimizer": "the optimizer belongs to the run's configuration (train.lr, train.merger_lr, train.weight_decay)",
    "scheduler": "the schedule belongs to the run's configuration (train.steps, train.warmup)",
    "activation_checkpointing": "it belongs to the run's configuration (train.activation_checkpointing)",
    "tensorboard": "logging belongs to the run's configuration (train.tensorboard)",
    "wandb": "logging belongs to the run's configuration (train.wandb)",
    "csv_monitor": "metrics are always written to metrics.jsonl",
    "amp": "precision is bf16 or float32 (model.dtype)",
    "torch_autocast": "precision is bf16 or float32 (model.dtype)",
    "gradient_allreduce_op": "the loop needs DeepSpeed's mean over ranks",
    "managed_gradient_accumulation": "the loop needs DeepSpeed's own accumulation",
}
"""Keys of DeepSpeed with an owner elsewhere, and why."""


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; a key given twice is an error.

    Raises:
        ValueError: missing, unreadable, or not a JSON object; one sentence that names the file.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the DeepSpeed JSON: {error.strerror}; give --deepspeed a file such as "
            "ds_configs/zero3.json."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not a valid DeepSpeed JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: not a valid DeepSpeed JSON: it must be an object in braces.")
    return raw


def resolve_ds_config(
    raw: dict[str, Any],
    *,
    path: str | Path,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    bf16: bool,
    local_size: int | None = None,
) -> dict[str, Any]:
    """Fill "auto" from the run's configuration; ``raw`` is left as it is.

    Args:
        raw: of `load_ds_config`.
        path: the file, for messages.
        global_batch: samples per optimizer step over all ranks and accumulation steps.
        micro_batch: samples per forward per rank.
        world_size: ranks.
        bf16: whether weights and activations are bfloat16 (else float32).
        local_size: ranks on this machine; None for what the launcher says.

    Returns:
        What `deepspeed.initialize` takes, without any "auto".

    Raises:
        ValueError: the JSON contradicts the configuration, holds what this project cannot honour or what DeepSpeed
            does not know.
    """
    _check_keys(raw, path)
    per_pass = micro_batch * world_size
    if global_batch % per_pass:
        raise ValueError(
            f"train.global_batch is {global_batch}, not divisible by train.micro_batch {micro_batch} x {world_size} "
            f"ranks = {per_pass}; change train.global_batch, train.micro_batch or the number of ranks."
        )
    accumulation = global_batch // per_pass
    config = copy.deepcopy(raw)
    _fill(config, "train_batch_size", global_batch, f"train.global_batch is {global_batch}", path)
    _fill(config, "train_micro_batch_size_per_gpu", micro_batch, f"train.micro_batch is {micro_batch}", path)
    _fill(
        config,
        "gradient_accumulation_steps",
        accumulation,
        f"train.global_batch {global_batch} / (train.micro_batch {micro_batch} x {world_size} ranks) is {accumulation}",
        path,
    )
    section = config.setdefault("bf16", {})
    if not isinstance(section, dict):
        raise ValueError(f'{path}: bf16 is {_show(section)}; write {{"enabled": "auto"}}.')
    dtype = "bfloat16" if bf16 else "float32"
    _fill(section, "enabled", bf16, f"model.dtype resolves to {dtype} on this machine", path, "bf16.")
    own = "the optimizer is the run configuration's AdamW"
    _fill(config, "zero_allow_untested_optimizer", True, own, path)
    _fill(config, "zero_force_ds_cpu_optimizer", False, own, path)
    if isinstance(zero := config.get("zero_optimization"), dict):
        fill_hierarchy(zero, path, world_size, local_size or ranks_per_machine(world_size))
    for where in _autos(config):
        raise ValueError(
            f'{path}: {where} is "auto", which nothing here can fill; write a value or leave the key out '
            f"for DeepSpeed's default."
        )
    check_sections(config, path)
    return config


def free_port() -> int:
    """A port on which nothing listens now, for the launcher's `--master_port`; another program may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def collective_timeout(hang_seconds: float) -> timedelta:
    """How long a collective waits: longer than the watchdog, which speaks first and says more.

    At least half an hour: in the set-up, where no limit of `train.hang_seconds` holds, ranks wait for the one that
    reads its weights slowest.
    """
    return timedelta(seconds=max(1800.0, 2 * hang_seconds))


def own_extensions() -> None:
    """Give this start of a job a folder of its own for what DeepSpeed compiles, unless TORCH_EXTENSIONS_DIR names one.

    In the folder that all jobs of a user share, the lock of a build that was killed lets every later run hang without
    a word. The ranks of a machine share the folder (their Slurm step, or their launcher's process, is the same), so
    that a kernel is built once per start and machine; whoever wants to keep it names a folder.

    Raises:
        ValueError: somebody else could put compiled code there.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    slurm = [os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
    start = "-".join(filter(None, slurm)) if slurm[0] else f"launcher-{os.getppid()}"
    mine = Path(tempfile.gettempdir()) / f"w2r2-ds-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    found = mine.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{mine}, where DeepSpeed would compile, is no folder or others may write to it; remove it, or name a "
            "folder of your own in TORCH_EXTENSIONS_DIR."
        )
    os.environ["TORCH_EXTENSIONS_DIR"] = str(mine / f"extensions-{start}")


def join_ranks(hang_seconds: float = 0.0) -> None:
    """Meet the other ranks of the launcher; without a launcher this process is the only one.

    Args:
        hang_seconds: of the run's configuration, see `collective_timeout`.

    Raises:
        ValueError: see `own_extensions`; or another run has this machine's port.
        Unreachable: the ranks cannot meet otherwise; under Slurm also at a port that is taken, for the next start has
            another one.
    """
    import deepspeed
    import torch
    from torch.distributed import DistError

    from w2r2_ds.engine.exits import Unreachable

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own_extensions()
    skip_shm_build()
    try:
        deepspeed.init_distributed(timeout=collective_timeout(hang_seconds))
    except DistError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) and "SLURM_JOB_ID" not in os.environ:
            raise ValueError(
                f"port {port} of this machine is taken, probably by another run; start this one with a port of its "
                f"own: deepspeed --master_port {free_port()} launchers/train.py ..."
            ) from None
        raise Unreachable(
            f"the ranks cannot meet at {address}, port {port} ({' '.join(str(error).split())}); check the launcher's "
            "--master_addr and --master_port."
        ) from error


def skip_shm_build() -> None:
    """On a CPU, keep DeepSpeed from compiling its shared-memory all-reduce; call before `init_distributed`.

    The build needs a C++ compiler and Python's headers and hangs for ever on the lock of a build that was killed;
    gloo does the same work. DeepSpeed keeps this table to be edited (deepspeed/ops/__init__.py).
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_keys(raw: dict[str, Any], path: str | Path) -> None:
    """Refuse top-level keys by name, and fp16."""
    for key in raw:
        if key in REFUSED:
            raise ValueError(f'{path}: remove "{key}": {REFUSED[key]}.')
        if key not in KNOWN:
            raise ValueError(f"{path}: {unknown(key, KNOWN)}; known are {', '.join(sorted(KNOWN))}.")
    fp16 = raw.get("fp16", {})
    if not isinstance(fp16, dict) or fp16.get("enabled", False) is not False:
        raise ValueError(
            f'{path}: fp16 is not supported, its range is too small for these models; remove "fp16" and use '
            f'"bf16": {{"enabled": "auto"}} with model.dtype bfloat16.'
        )


def _fill(
    section: dict[str, Any], key: str, value: int | bool, because: str, path: str | Path, prefix: str = ""
) -> None:
    """Set ``section[key]`` where it is missing or "auto"; refuse another value."""
    given = section.get(key, AUTO)
    if given != AUTO and (type(given) is not type(value) or given != value):
        raise ValueError(
            f'{path}: {prefix}{key} is {_show(given)}, but {because}; write "auto" or {_show(value)} in the JSON, '
            f"or change the run's configuration."
        )
    section[key] = value


def _autos(value: Any, where: str = "") -> Iterator[str]:
    """Key paths of what is still "auto"."""
    if value == AUTO:
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{where}[{index}]")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f'the key "{key}" is given twice')
        result[key] = value
    return result


def _show(value: Any) -> str:
    """As the JSON writes it."""
    return json.dumps(value)
