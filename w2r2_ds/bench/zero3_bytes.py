"""Bytes that ZeRO-3 gathers per training step for each `train.pass_order`, and the time of the step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from w2r2_ds.bench.harness import Spread, ratio
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import find_shapes
from w2r2_ds.training.deepspeed.launch import free_port

WAYS = ("single pass", "sequential", "lockstep")


def zero3_bytes(shape: str = "cpu", ranks: int = 2, rounds: int = 5) -> Report:
    """Bytes gathered per training step, relative to the bytes of all sharded parameters, and seconds by the clock.

    Args:
        shape: cpu or tiny; the towers are not included.
        ranks: number of processes on this machine.
        rounds: number of timed steps per pass order, interleaved.
    """
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1.")
    find_shapes(shape, [])
    found = run_ranks(ranks, shape, rounds)
    report = Report("zero3_bytes", f"gathers of ZeRO-3 per step, {ranks} ranks, LoRA, checkpointing", [])
    spreads = {way: Spread(tuple(found[way]["seconds"])) for way in WAYS}
    for way in WAYS:
        each = found[way]
        report.rows.append(
            {
                "pass_order": way,
                "gathered_mib": each["bytes"] / 2**20,
                "/parameters": each["bytes"] / found["parameters"],
                "fewest of a layer's": min(each["gathers"]),
                "most of a layer's": max(each["gathers"]),
                **spreads[way].columns(),
                "/single pass": ratio(spreads[way], spreads[WAYS[0]]),
            }
        )
    single, lockstep = found["single pass"]["bytes"], found["lockstep"]["bytes"]
    report.criteria.append(Criterion("bytes, lockstep / single pass", lockstep / single, 1.0))
    report.notes.append(
        "stage3_max_live_parameters holds two decoder layers here, as ds_configs/ do at real sizes; what fits below it "
        "altogether would be gathered once. Seconds are those of the clock: ranks wait for each other."
    )
    return report


def run_ranks(ranks: int, shape: str, rounds: int) -> dict[str, Any]:
    """Run `zero3_rank` in `ranks` processes; returns the result of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        result = Path(folder) / "result.json"
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "w2r2_ds.bench.zero3_rank", shape, str(result), str(rounds)]
            with open(Path(folder) / f"{rank}.txt", "w") as log:
                processes.append(subprocess.Popen(command, env=environment | place, stdout=log, stderr=log))
        failed = [rank for rank, process in enumerate(processes) if process.wait()]
        if failed:
            raise RuntimeError(f"rank {failed[0]} failed:\n" + (Path(folder) / f"{failed[0]}.txt").read_text()[-2000:])
        answer: dict[str, Any] = json.loads(result.read_text())
    return answer
