"""Log the metrics of every optimizer step: metrics.jsonl, a progress line, and experiment trackers."""

from __future__ import annotations

import io
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
from PIL import Image

from w2r2_ds.training.progress_line import ProgressLine
from w2r2_ds.training.trackers import TRACKERS, Tracker, check_trackers
from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.json_io import read_jsonl
from w2r2_ds.utils.files.output_folder import make_folder

METRICS_FILE = "metrics.jsonl"
SAMPLES_FOLDER = "samples"
"""Folder of the run with the pictures of `train.samples_every`."""
PROCESS_STATUS = Path("/proc/self/status")
BUFFER = 2**20
"""Bytes of lines that are kept in memory while the disk is full; enough for thousands of steps."""

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Context manager that logs the scalars of each optimizer step on rank 0.

    Other ranks write nothing, but must call `start`, which is collective.

    Args:
        run_dir: folder of the run, with metrics.jsonl.
        total_steps: optimizer steps of the whole run.
        trackers: names of experiment trackers, keys of `TRACKERS`.
        rank: rank of this process.
        images: whether `log_image` will be called; trackers must then have this method.

    Raises:
        ValueError: a tracker is unknown or its package is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        trackers: Sequence[str] = (),
        rank: int = 0,
        images: bool = False,
    ) -> None:
        check_trackers(trackers)  # on every rank, so that all raise the same error
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS_FILE
        self.total_steps = total_steps
        self.active = rank == 0
        self._tracker_names = trackers
        self._images = images
        self._trackers: list[Tracker] = []
        self._last_step = 0
        self._file: BinaryIO | None = None
        self._write_failed = False
        self._progress: ProgressLine | None = None

    def start(self, step: int) -> None:
        """Open metrics.jsonl and the trackers of a run that continues after `step` optimizer steps (0: a new run).

        Collective: it raises on all ranks or on none.

        Lines of later steps are dropped, so that a resumed run logs no step twice. An incomplete last line of a killed
        run is dropped too. A fresh run (`step` 0) starts with an empty file.

        Raises:
            ValueError: a line of the file has no step, or a tracker cannot be opened or has no method for pictures.
        """
        assert self._file is None, "start is called once"
        self._last_step = step
        with raise_on_all_ranks():
            if self.active:
                make_folder(self.run_dir)
                self._drop_after(step)
                for name in self._tracker_names:
                    self._trackers.append(TRACKERS[name](self.run_dir, step))
                    if self._images and not hasattr(self._trackers[-1], "log_image"):
                        raise ValueError(
                            f"train.samples_every: the tracker {name} has no method log_image; add it "
                            "(docs/guides/add-a-tracker.md), or set train.samples_every to 0."
                        )
                self._progress = ProgressLine(self.total_steps, step)
                self._file = open(self.path, "ab", buffering=BUFFER)  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the scalars of an optimizer step; ``memory_gib`` is added.

        Args:
            step: number of the step, from 1 and increasing.
            values: finite numbers, keyed by metric.

        Raises:
            ValueError: a value is not a finite number, or the step does not increase; then nothing is written.
        """
        if not self.active:
            return
        assert self._progress is not None, "start is called before log"
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

    def log_image(self, step: int, image: Image.Image) -> None:
        """Write ``samples/step_N.png``, and log the picture to the trackers; before `log` of the same step."""
        if not self.active:
            return
        file = self.run_dir / SAMPLES_FOLDER / f"step_{step}.png"
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        try:
            make_folder(file.parent)
            atomic_io.replace(file, buffer.getvalue())
        except OSError as error:  # a full disk must not end the run
            logger.warning("%s cannot be written (%s).", file, error.strerror)
        for tracker in self._trackers:
            tracker.log_image(step, SAMPLES_FOLDER, image)

    def _write(self, line: str) -> None:
        """Append a line; on a full disk it stays in the file's buffer, and is written with a later line."""
        assert self._file is not None, "start is called before log"
        try:
            self._file.write(line.encode())
            self._file.flush()
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:  # warn once, not every step
                cause = f"{self.path} cannot be written ({error.strerror})"
                logger.warning("%s; its lines are kept in memory and written later.", cause)
            self._write_failed = True

    def sync(self) -> None:
        """Fsync metrics.jsonl; called before a checkpoint, so that the file has a line for every saved step."""
        if self._file is not None:
            with suppress(OSError):  # an error of the log must not end the run
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
                logger.warning("%s: the last steps could not be written (%s).", self.path, error.strerror)
        self._progress = self._file = None
        self._trackers = []

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        """Drop lines of steps after `step`, which an earlier launch wrote."""
        if not self.path.exists():
            return
        kept = [values for logged, values in read_metrics(self.path) if logged <= step]
        # A new file: an earlier launch that still hangs in a write continues in the old one.
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
    # Not resource.getrusage: its peak includes that of the parent process before exec.
    (line,) = [line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20
