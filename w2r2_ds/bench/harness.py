"""Time benchmark cases with CPU time or CUDA events, in interleaved runs; measure peak memory in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2r2_ds.utils.gpus import check_gpus

Case = Callable[[], object]
"""Function that runs a benchmark case once. Timed as a whole, unless it returns a `Lap` with the time of a part."""


@dataclass
class Lap:
    """Timer of one run; intervals add up.

    Attributes:
        seconds: total of the intervals timed on the CPU.
        marks: start and end events of the intervals timed on the GPU.
    """

    seconds: float = 0.0
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def total(self) -> float:
        """Total seconds; synchronises with the GPU if it has events."""
        if self.marks:
            torch.cuda.synchronize()
        return self.seconds + sum(begin.elapsed_time(end) for begin, end in self.marks) / 1000


@contextmanager
def timed(lap: Lap, device: torch.device) -> Iterator[None]:
    """Add the time of the block to a timer: CPU time of this process, or time between two CUDA events.

    On a shared machine CPU time measures the computation alone; wall-clock time depends on other processes.
    """
    if device.type == "cuda":
        # `Lap.total` reads the events later: a synchronisation here would add the launch overhead of the next kernels.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        lap.marks.append((begin, end))
        return
    started = time.process_time()
    yield
    lap.seconds += time.process_time() - started


@dataclass(frozen=True)
class Spread:
    """Measurements of one case.

    Attributes:
        seconds: time of every run.
        peak: peak memory allocated on the GPU in bytes; None on the CPU.
    """

    seconds: tuple[float, ...]
    peak: int | None = None

    @property
    def median(self) -> float:
        """Median in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile in seconds."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def columns(self) -> dict[str, Any]:
        """Columns of a table row."""
        low, high = self.quartiles
        memory = {} if self.peak is None else {"peak_gib": self.peak / 2**30}
        return {"seconds": self.median, "q1": low, "q3": high, "runs": len(self.seconds)} | memory


def interleave(cases: Mapping[str, Case], rounds: int, device: torch.device, warmups: int = 0) -> dict[str, Spread]:
    """Run every case once per round, so that a temporary slowdown of the machine affects all cases alike.

    Args:
        cases: name -> case, in order; every second round runs them in reverse order.
        rounds: number of measured runs per case.
        device: device that the cases run on.
        warmups: number of rounds that run first and are not measured.
    """
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1.")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, int] = {}
    for turn in range(warmups + rounds):
        # Alternating order: otherwise the first case of every round would always follow the last one.
        order = list(cases) if turn % 2 == 0 else list(reversed(list(cases)))
        for name in order:
            if device.type == "cuda":
                torch.cuda.synchronize()  # otherwise kernels of the previous case would run in this interval
                torch.cuda.reset_peak_memory_stats()
            outer = Lap()
            with timed(outer, device):
                own = cases[name]()
            elapsed = (own if isinstance(own, Lap) else outer).total()
            del own  # a result on the GPU would count as memory of the next case
            if turn >= warmups:
                seconds[name].append(elapsed)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
    return {name: Spread(tuple(seconds[name]), peaks.get(name)) for name in cases}


def time_ratio(case: Spread, base: Spread) -> float:
    """Median over rounds of case / base; both are of the same round, so that a slow round has little effect."""
    return float(np.median(np.array(case.seconds) / np.array(base.seconds)))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call a function of a module in a new Python process and return its JSON-like result.

    Raises:
        RuntimeError: the process failed; with the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = [function.__module__, function.__qualname__, list(arguments), str(result)]
        # glibc then maps blocks above 64 KiB directly and returns freed memory at once, so that the resident memory is
        # the memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"{function.__qualname__}{arguments} failed:\n{done.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def peak_bytes(function: Callable[[], Any]) -> int:
    """Increase of the peak resident memory in bytes during a call (Linux)."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Value in bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def find_device() -> torch.device:
    """Return the GPU if there is one, else the CPU, limited to one thread. Raises ValueError if GPUs are hidden."""
    check_gpus(local_ranks=1)
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)  # threads that wait for each other on a shared machine would add to the CPU time
    return torch.device("cpu")


def _serve(request: str) -> None:
    """Entry point of the process that `in_fresh_process` starts."""
    module, name, arguments, result = json.loads(request)
    find_device()
    Path(result).write_text(json.dumps(getattr(import_module(module), name)(*arguments)))


if __name__ == "__main__":
    _serve(sys.argv[1])
