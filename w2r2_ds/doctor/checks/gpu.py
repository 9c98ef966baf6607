"""Checks of GPUs: one per rank, correct matrix products, health counters from nvidia-smi."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief

if TYPE_CHECKING:
    import torch

SMI_SECONDS = 15
SIDE = 512
"""Number of rows and columns of the matrices."""
BUSY = 0.05
"""Fraction of a GPU's memory in use above which another program probably uses the GPU."""
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
"""Fields of ``nvidia-smi --query-gpu``."""
UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')


def check_device(local_rank: int) -> CheckResult:
    """Check that this rank has a GPU that multiplies matrices correctly; on a machine without GPUs, check the CPU."""
    import torch

    result = CheckResult()
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and _nvidia_smi(("index",))[0]:
            result.errors.append(
                f"nvidia-smi lists GPUs, but torch {torch.__version__} finds none; install a torch for the driver's "
                "CUDA version (pytorch.org), and check CUDA_VISIBLE_DEVICES."
            )
        result.info["accelerator"] = "none (CPU)"
        result.must_match["accelerator"] = "CPU"
        result.errors += check_product("cpu", torch.float32)
        return result
    count = torch.cuda.device_count()
    if local_rank >= count:
        result.errors.append(
            f"local rank {local_rank} would use GPU {local_rank}, but {count} are visible; start at most as many ranks "
            "per node as it has GPUs, and make all of them visible to every rank (no --gpus-per-task, no --gpu-bind)."
        )
        return result
    name = torch.cuda.get_device_name(local_rank)
    memory = torch.cuda.get_device_properties(local_rank).total_memory
    result.info["accelerator"] = f"{count} x {name}, {memory / 2**30:.0f} GiB"
    result.must_match["accelerator"] = name
    result.info["CUDA of torch"] = str(torch.version.cuda)
    result.errors += check_product(f"cuda:{local_rank}", torch.float32)
    if torch.cuda.is_bf16_supported():
        result.errors += check_product(f"cuda:{local_rank}", torch.bfloat16)
    return result


def check_product(device: str, dtype: torch.dtype) -> list[str]:
    """Multiply integer matrices, whose product is exact in any dtype and order of summation; returns error messages."""
    import numpy as np
    import torch

    generator = np.random.default_rng(0)
    left, right = generator.integers(-1, 2, (2, SIDE, SIDE)).astype(np.float64)
    # Sums of 512 terms in {-1, 0, 1} stay below 2^8 (17 standard deviations); up to there bfloat16 is exact.
    expected = left @ right
    assert np.abs(expected).max() <= 256, "exact in bfloat16"
    try:
        found = torch.from_numpy(left).to(device, dtype) @ torch.from_numpy(right).to(device, dtype)
        differing = int((found.double().cpu().numpy() != expected).sum())
    except RuntimeError as error:  # the type of CUDA's errors
        return [f"{device} cannot multiply matrices in {dtype} ({' '.join(str(error).split())[:200]}); replace it."]
    if differing:
        return [
            f"{device} computes wrong results: {differing} of {SIDE * SIDE} numbers of a matrix product in {dtype}; "
            "exclude this node (sbatch --exclude) and have it repaired."
        ]
    return []


def check_health() -> CheckResult:
    """Check the health counters of every GPU of this node; an empty result on a machine without nvidia-smi."""
    result = CheckResult()
    if shutil.which("nvidia-smi") is None:
        return result
    rows, reason = _nvidia_smi(FIELDS)
    if not rows:
        result.errors.append(
            f"nvidia-smi lists no GPU ({reason}); the driver does not work: run nvidia-smi on this node, and "
            "exclude the node (sbatch --exclude) until that works."
        )
    for row in rows:
        result.info[f"GPU {row['index']}"] = f"{row['name']}, driver {row['driver_version']}"
        result.should_match["the GPU driver"] = row["driver_version"]
        result.errors += _defects(row)
        used, total = _number(row["memory.used"]), _number(row["memory.total"])
        if total and used / total > BUSY:
            result.warnings.append(
                f"GPU {row['index']} already has {used:.0f} of {total:.0f} MiB in use; another program may run there: "
                "check with nvidia-smi."
            )
    return result


def _defects(row: dict[str, str]) -> list[str]:
    """Error messages for health counters of a GPU that should not be used."""
    gpu = f"GPU {row['index']} ({row['name']})"
    advice = "exclude this node (sbatch --exclude) and have the GPU reset or replaced"
    found = []
    if errors := _number(row["ecc.errors.uncorrected.volatile.total"]):
        found.append(f"{gpu} has {errors:.0f} memory errors that ECC could not correct; {advice}.")
    if row["remapped_rows.failure"] == "Yes" or _number(row["remapped_rows.failure"]):
        found.append(f"{gpu} could not remap a broken memory row; {advice}.")
    pending = [
        name for name in ("retired_pages.pending", "remapped_rows.pending") if row[name] == "Yes" or _number(row[name])
    ]
    if pending:
        found.append(f"{gpu} waits for a reset ({', '.join(pending)}); {advice}.")
    if row["clocks_throttle_reasons.hw_thermal_slowdown"] == "Active":
        found.append(f"{gpu} is throttled because it is too hot; {advice}.")
    return found


def _number(value: str) -> float:
    """Decode a number from nvidia-smi; 0 for counters that this GPU does not have (``[N/A]``)."""
    try:
        return float(value.split()[0])
    except (ValueError, IndexError):
        return 0.0


def _nvidia_smi(fields: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """Query nvidia-smi: a row per GPU (unsupported fields are ``[N/A]``) and its output, a reason if there is none."""
    supported = list(fields)
    end = time.monotonic() + SMI_SECONDS
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(supported)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return [], f"no output within {SMI_SECONDS} s"
        except OSError as error:
            return [], brief(error)
        output = " ".join(f"{done.stderr} {done.stdout}".split())
        if done.returncode == 0:
            break
        unsupported = UNKNOWN_FIELD.search(output)
        if unsupported is None or unsupported[1] not in supported or len(supported) == 1:
            return [], f"exit status {done.returncode}: {output[:300] or 'no output'}"
        supported.remove(unsupported[1])  # older drivers lack some fields: query again without this one
    missing = dict.fromkeys(fields, "[N/A]")
    rows = [row for row in csv.reader(io.StringIO(done.stdout), skipinitialspace=True) if len(row) == len(supported)]
    return [missing | dict(zip(supported, row, strict=True)) for row in rows], output[:300] or "no output"
