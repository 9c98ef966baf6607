"""GPUs: as many as ranks, a product that is right, and what nvidia-smi says of their health."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import time

from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief

SMI_SECONDS = 15
SIDE = 512
"""Of the matrices that are multiplied."""
BUSY = 0.05
"""Share of a GPU's memory in use before the start above which another program has it."""

FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.used",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)

_UNKNOWN = re.compile(r'Field "([^"]+)" is not a valid field to query')


def check_device(local_rank: int, world: int) -> CheckResult:
    """This rank's accelerator: there, and its matrix product right; on a machine without GPUs the CPU's."""
    import torch

    outcome = CheckResult()
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and _smi(("index",))[0]:
            outcome.wrong.append(
                f"nvidia-smi shows GPUs, but torch {torch.__version__} sees none; install a torch of the driver's CUDA "
                "version (pytorch.org), and look at CUDA_VISIBLE_DEVICES."
            )
        outcome.shown["accelerator"] = "none, the CPU"
        outcome.equal["accelerator"] = "CPU"
        outcome.wrong += product_wrong("cpu", torch.float32)
        return outcome
    count = torch.cuda.device_count()
    if local_rank >= count:
        outcome.wrong.append(
            f"local rank {local_rank} would use GPU {local_rank}, but sees {count}; start at most as many ranks per "
            "node as it has GPUs, and let every rank see all of them (no --gpus-per-task, no --gpu-bind)."
        )
        return outcome
    name = torch.cuda.get_device_name(local_rank)
    memory = torch.cuda.get_device_properties(local_rank).total_memory
    outcome.shown["accelerator"] = f"{count} x {name}, {memory / 2**30:.0f} GiB"
    outcome.equal["accelerator"] = name
    outcome.shown["CUDA of torch"] = str(torch.version.cuda)
    if world == 1 and count > 1:
        outcome.shown["accelerator"] += " (this process uses one)"
    outcome.wrong += product_wrong(f"cuda:{local_rank}", torch.float32)
    if torch.cuda.is_bf16_supported():
        outcome.wrong += product_wrong(f"cuda:{local_rank}", torch.bfloat16)
    return outcome


def product_wrong(device: str, dtype: object) -> list[str]:
    """Multiply whole numbers, whose product is exact in any precision and order, and compare with NumPy's."""
    import numpy as np
    import torch

    assert isinstance(dtype, torch.dtype), "a dtype of torch"
    drawn = np.random.default_rng(0)
    left, right = drawn.integers(-1, 2, (2, SIDE, SIDE)).astype(np.float64)
    # Sums of 512 terms in {-1, 0, 1} stay below 2^8 (17 standard deviations); up to there bfloat16 is exact.
    expected = left @ right
    assert np.abs(expected).max() <= 256, "exact in bfloat16"
    try:
        found = torch.from_numpy(left).to(device, dtype) @ torch.from_numpy(right).to(device, dtype)
        differing = int((found.double().cpu().numpy() != expected).sum())
    except RuntimeError as error:  # CUDA's errors are of this kind
        return [f"{device} cannot multiply matrices in {dtype} ({' '.join(str(error).split())[:200]}); replace it."]
    if differing:
        return [
            f"{device} computes wrong: {differing} of {SIDE * SIDE} numbers of a matrix product in {dtype}; leave this "
            "node out (sbatch --exclude) and have it repaired."
        ]
    return []


def check_health() -> CheckResult:
    """What nvidia-smi says of every GPU of this node; nothing on a machine without it."""
    outcome = CheckResult()
    if shutil.which("nvidia-smi") is None:
        return outcome
    rows, why = _smi(FIELDS)
    if not rows:
        outcome.wrong.append(
            f"nvidia-smi lists no GPU ({why}); the driver is not well: run nvidia-smi on this node, and leave it out "
            "(sbatch --exclude) until that answers."
        )
    for row in rows:
        outcome.shown[f"GPU {row['index']}"] = f"{row['name']}, driver {row['driver_version']}"
        outcome.alike["the GPU driver"] = row["driver_version"]
        outcome.wrong += _illness(row)
        used, total = _number(row["memory.used"]), _number(row["memory.total"])
        if total and used / total > BUSY:
            outcome.warnings.append(
                f"GPU {row['index']} already has {used:.0f} of {total:.0f} MiB in use; another program may run there: "
                "look with nvidia-smi."
            )
    return outcome


def _illness(row: dict[str, str]) -> list[str]:
    """What of a GPU's counters means that it should not be used, one sentence each."""
    gpu = f"GPU {row['index']} ({row['name']})"
    away = "leave this node out (sbatch --exclude) and have the GPU reset or replaced"
    found = []
    errors = _number(row["ecc.errors.uncorrected.volatile.total"])
    if errors:
        found.append(f"{gpu} has {errors:.0f} memory errors that ECC could not correct; {away}.")
    if row["remapped_rows.failure"] == "Yes" or _number(row["remapped_rows.failure"]):
        found.append(f"{gpu} could not remap a broken row of its memory; {away}.")
    pending = [name for name in ("retired_pages.pending", "remapped_rows.pending") if _said(row[name])]
    if pending:
        found.append(f"{gpu} waits for a reset ({', '.join(pending)}); {away}.")
    if row["clocks_throttle_reasons.hw_thermal_slowdown"] == "Active":
        found.append(f"{gpu} is slowed down by its heat; {away}.")
    return found


def _said(value: str) -> bool:
    return value == "Yes" or _number(value) > 0


def _number(value: str) -> float:
    """A figure of nvidia-smi; 0 for what this kind of GPU does not count (``[N/A]``)."""
    try:
        return float(value.split()[0])
    except (ValueError, IndexError):
        return 0.0


def _smi(fields: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """A row per GPU, and why there is none; what this driver's nvidia-smi does not know of a GPU is ``[N/A]``."""
    known = list(fields)
    end = time.monotonic() + SMI_SECONDS
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(known)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return [], f"it did not answer within {SMI_SECONDS} s"
        except OSError as error:
            return [], brief(error)
        said = " ".join(f"{done.stderr} {done.stdout}".split())
        if done.returncode == 0:
            break
        unknown = _UNKNOWN.search(said)
        if unknown is None or unknown[1] not in known or len(known) == 1:
            return [], f"exit status {done.returncode}: {said[:300] or 'nothing said'}"
        known.remove(unknown[1])
    nothing = dict.fromkeys(fields, "[N/A]")
    rows = [row for row in csv.reader(io.StringIO(done.stdout), skipinitialspace=True) if len(row) == len(known)]
    return [nothing | dict(zip(known, row, strict=True)) for row in rows], said[:300] or "it said nothing"
