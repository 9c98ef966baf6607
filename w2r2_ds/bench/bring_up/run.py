"""Checks and measurements for the first hour on a new GPU: ``w2r2 bench bring_up``.

A part is a function from `Settings` to a report, and one entry of `PARTS`. A part that fails does not stop the others.
docs/get-started/gpu-quickstart.md explains the results.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from w2r2_ds.bench.bring_up import gpu_tests, modules, sdpa_backends, step_equivalence, steps, zero3
from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.report import BenchReport, describe_machine
from w2r2_ds.utils.files import atomic_io

logger = logging.getLogger(__name__)

PARTS: dict[str, Callable[[Settings], BenchReport]] = {
    "gpu_tests": gpu_tests.run,
    "step_equivalence": step_equivalence.run,
    "sdpa_backends": sdpa_backends.run,
    "modules": modules.run,
    "zero3": zero3.run,
    "steps": steps.run,
}
"""Parts in the order in which they run: correctness first, the longest last."""


@dataclass
class PartResult:
    """Result of one part.

    Attributes:
        name: name of the part.
        seconds: wall-clock time.
        report: its report; None if it failed.
        error: the reason why it failed, or was not run; else empty.
    """

    name: str
    seconds: float
    report: BenchReport | None = None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether the part did not run, or a value is above its limit."""
        return self.report is None or not all(each.met for each in self.report.criteria)

    def row(self) -> dict[str, Any]:
        """Row of the summary."""
        result = self.error
        if self.report is not None:
            unmet = sum(not each.met for each in self.report.criteria)
            result = f"{unmet} of {len(self.report.criteria)} values above their limit" if unmet else "done"
        return {"part": self.name, "result": result, "seconds": self.seconds}


@dataclass
class BringUpReport:
    """Results of all parts.

    Attributes:
        parts: results in the order in which the parts ran.
        machine: processor, GPU and versions.
    """

    parts: list[PartResult] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())

    @property
    def failed(self) -> bool:
        """Whether a part failed; it is then the exit code of the command."""
        return any(part.failed for part in self.parts)

    def summary(self) -> BenchReport:
        """Table of the parts."""
        rows = [part.row() for part in self.parts]
        return BenchReport("bring_up", "first checks and measurements on a device", rows, machine=self.machine)

    def to_json(self) -> dict[str, Any]:
        """The summary, and the reports of the parts that ran under ``parts``."""
        reports = {part.name: part.report.to_json() for part in self.parts if part.report is not None}
        return self.summary().to_json() | {"parts": reports}

    def save(self, path: Path) -> None:
        """Write all reports as one JSON file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.replace(path, json.dumps(self.to_json(), indent=2) + "\n")

    def show(self, console: Console | None = None) -> None:
        """Print a table per part, and the summary last."""
        for part in self.parts:
            if part.report is not None:
                part.report.show(console, with_machine=False)
        self.summary().show(console)


def run(settings: Settings, names: list[str] | None) -> BringUpReport:
    """Run parts, by default all of them.

    Args:
        settings: device and sizes.
        names: names of parts.

    Raises:
        ValueError: a part does not exist.
    """
    for name in names or []:
        if name not in PARTS:
            raise ValueError(f"--parts has {name!r}; it may have {', '.join(PARTS)}.")
    report, began = BringUpReport(), time.perf_counter()
    for name in names or list(PARTS):
        if settings.expired():
            report.parts.append(PartResult(name, 0.0, error="not run: the time is over (--seconds)"))
            continue
        logger.info("%s, after %.0f s", name, time.perf_counter() - began)
        report.parts.append(run_part(name, settings))
    return report


def run_part(name: str, settings: Settings) -> PartResult:
    """Run one part and free its memory; its errors become part of the result."""
    began = time.perf_counter()
    report, error = None, ""
    try:
        report = PARTS[name](settings)
    except Exception as exception:  # out of memory, errors of compilers and drivers: many types
        logger.exception("%s failed", name)
        error = f"failed: {type(exception).__name__}: {first_line(exception)}"
    seconds = time.perf_counter() - began
    # After the handler, where the exception still refers to tensors of the part. Once a kernel has broken the CUDA
    # context, this fails too, and so do all parts but those with processes of their own; the report is still written.
    try:
        steps.release(settings.device)
    except Exception as exception:
        logger.exception("the memory of %s could not be freed", name)
        report, error = None, error or f"failed: {type(exception).__name__}: {first_line(exception)}"
    return PartResult(name, seconds, report, error)


def first_line(error: Exception) -> str:
    """First line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), "")
