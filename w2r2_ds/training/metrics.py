"""Log the metrics of every optimizer step: metrics.jsonl, a progress line, and the trackers of `train.trackers`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from w2r2_ds.training.progress_line import ProgressLine
from w2r2_ds.training.trackers import TRACKERS, Tracker, check_trackers
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.json_io import read_jsonl

FILE = "metrics.jsonl"
PROCESS_STATUS = Path("/proc/self/status")
BUFFER = 2**20
"""Bytes of lines kept while the disk is full; thousands of steps."""

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Logs the scalars of each optimizer step on rank 0; on other ranks every method does nothing.

    Args:
        run_dir: folder of the run; metrics.jsonl in it is appended to.
        total_steps: optimizer steps of the whole run.
        trackers: names in `TRACKERS`.
        rank: rank of this process.

    Raises:
        ValueError: a tracker is unknown or its package is not installed.
    """

    def __init__(self, run_dir: str | Path, total_steps: int, trackers: Sequence[str] = (), rank: int = 0) -> None:
        check_trackers(trackers)  # on all ranks, so that all stop with the same error
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / FILE
        self.total_steps = total_steps
        self.active = rank == 0
        self._tracker_names = trackers
        self._trackers: list[Tracker] = []
        self._last_step = 0
        self._file: BinaryIO | None = None
        self._failed = False
        self._progress: ProgressLine | None = None

    def start(self, step: int) -> None:
        """Open all outputs, after `step` steps; collective: it fails on all ranks or on none.

        Lines of later steps are dropped, so that a resumed run logs no step twice; an incomplete last line of a killed
        run is dropped too. With `step` 0 the file starts empty.

        Raises:
            ValueError: a line of the file has no step, or a tracker does not start.
        """
        assert self._file is None, "start comes once"
        self._last_step = step
        with raise_on_all_ranks():
            if self.active:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self._drop_after(step)
                for name in self._tracker_names:
                    self._trackers.append(TRACKERS[name](self.run_dir, step))
                self._progress = ProgressLine(self.total_steps, step)
                self._file = open(self.path, "ab", buffering=BUFFER)  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the scalars of `step`, counted from 1 and increasing; ``memory_gib`` is added.

        Raises:
            ValueError: a value is not a finite number, or the step does not increase; then nothing is written.
        """
        if not self.active:
            return
        assert self._progress is not None, "start comes before the first log"
        if step <= self._last_step:
            raise ValueError(f"Step {step} was logged after step {self._last_step}; steps must increase.")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"The metric {name} of step {step} is {value!r}; it must be a finite number.")
        values = values | {"memory_gib": memory_gib()}
        self._write(json.dumps({"step": step} | values, allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.log(step, values)
        self._progress.update(step, values)
        self._last_step = step

    def _write(self, line: str) -> None:
        """Append a line; on a full disk, Python keeps it in its buffer and writes it with a later line."""
        assert self._file is not None, "start comes before the first log"
        try:
            self._file.write(line.encode())
            self._file.flush()
            self._failed = False
        except OSError as error:
            if not self._failed:  # warn once, not every step
                cause = f"{self.path} cannot be written ({error.strerror})"
                logger.warning("%s; its lines are kept in memory and written later.", cause)
            self._failed = True

    def sync(self) -> None:
        """Flush the file to disk; called before a checkpoint, so that a power cut leaves none without its lines."""
        if self._file is not None:
            with suppress(OSError):  # a log must not end the run
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._progress is not None:
            self._progress.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                logger.warning("%s lacks the last steps (%s).", self.path, error.strerror)
        self._progress = self._file = None
        self._trackers = []

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        """Keep the lines up to `step` of an earlier start."""
        if not self.path.exists():
            return
        kept = [values for number, values in read_metrics(self.path) if number <= step]
        # A new file: an earlier start that still runs (on a node without network) keeps writing to the old one.
        atomic_io.replace(self.path, "".join(json.dumps(values) + "\n" for values in kept))


def read_metrics(path: Path) -> list[tuple[int, dict[str, float]]]:
    """``(step, values)`` of every line of a metrics.jsonl; an incomplete last line is skipped.

    Raises:
        ValueError: a line is not a JSON object with an integer step.
    """
    result = []
    try:
        for number, values in read_jsonl(path, allow_torn_end=True):
            if type(values.get("step")) is not int:
                raise ValueError(f"{path}: line {number} has no step.")
            result.append((values["step"], values))
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; move the file away.") from None
    return result


def memory_gib() -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not resource.getrusage: its peak starts with that of the program that launched this one.
    (line,) = [line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20
