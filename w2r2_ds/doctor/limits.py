"""What the system allows a process: open files, shared memory for the loader's processes."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from w2r2_ds.doctor.result import CheckResult

SHM = Path("/dev/shm")
SHM_PER_BATCH = 128 * 2**20
"""Bytes: a micro-batch of some ten frames, as VGGT and the vision tower take them."""
FILES, FILES_PER_WORKER = 256, 64
"""Libraries, sockets and logs of a rank; tensors that a loader process shares, each an open file."""

FEW = 1024
"""Open files that are usually allowed: with fewer it is wrong not to have what is needed, else a warning."""


def check_limits(workers: int, prefetch: int, ranks: int) -> CheckResult:
    """Of this process, for `workers` loader processes per rank, as `DataConfig` has them, and `ranks` ranks here."""
    outcome = CheckResult()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = FILES + FILES_PER_WORKER * workers
    outcome.shown["open files"] = f"{_limit(soft)} (at most {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < files:
        (outcome.wrong if soft < FEW else outcome.warnings).append(
            f"a process may hold {soft} open files, a rank with data.workers {workers} may need {files}; run "
            f"ulimit -n {files} before the start (in slurm/cluster.env on a cluster), or lower data.workers."
        )
    if not SHM.is_dir():
        outcome.shown["shared memory"] = f"no {SHM}"
        if workers:
            outcome.wrong.append(f"there is no {SHM}, which data.workers {workers} need; mount it, or give 0 workers.")
        return outcome
    found = os.statvfs(SHM)
    size, needed = found.f_blocks * found.f_frsize, SHM_PER_BATCH * prefetch * workers * ranks
    outcome.shown["shared memory"] = f"{size / 2**30:.1f} GiB in {SHM}"
    if size < needed:
        outcome.wrong.append(
            f"{SHM} has {size / 2**30:.2f} GiB, {ranks} rank(s) with data.workers {workers} and data.prefetch "
            f"{prefetch} need {needed / 2**30:.2f}; enlarge it (docker: --shm-size {-(-needed // 2**30)}g), or lower "
            "them."
        )
    return outcome


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
