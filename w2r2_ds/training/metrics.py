"""What is logged: metrics.jsonl always, a progress line, Weights & Biases and TensorBoard where asked for."""

from __future__ import annotations

import json
import math
import re
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.distributed import raise_on_all_ranks

FILE = "metrics.jsonl"
SHOWN = ("loss", "align", "det", "push", "s_short", "s_fused")
"""Parts of the loss on the progress line, of what is logged."""
PROCESS = Path("/proc/self/status")
PLAIN_LINES = 50
"""Progress lines of a whole run where there is no terminal."""


class MetricsLogger:
    """Logs the scalars of each optimizer step, on rank 0; on other ranks every method does nothing.

    Args:
        run_dir: folder of the run; metrics.jsonl is appended to.
        total_steps: optimizer steps of the whole run.
        wandb: also log to Weights & Biases.
        tensorboard: also log to TensorBoard, in ``run_dir/tensorboard``.
        rank: of this process.

    Raises:
        ValueError: a package that was asked for is not installed.
    """

    def __init__(
        self, run_dir: str | Path, total_steps: int, wandb: bool = False, tensorboard: bool = False, rank: int = 0
    ) -> None:
        # Before the rank is looked at, so that all ranks stop alike.
        if wandb:
            require("wandb", "train.wandb")
        if tensorboard:
            require("tensorboard", "train.tensorboard")
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / FILE
        self.total_steps = total_steps
        self.active = rank == 0
        self._last_step = 0
        self._file: atomic_io.Lines | None = None
        self._wandb: Any = None
        self._board: Any = None
        self._progress: ProgressLine | None = None
        self._wanted = (wandb, tensorboard)

    def start(self, step: int) -> None:
        """Open everything before the first log, after ``step`` steps; every rank calls it, and it fails on all or none.

        What was logged past ``step`` is dropped, so that no step comes twice; a torn last line, of a killed run, goes
        too. With ``step`` 0 the file starts afresh.

        Raises:
            ValueError: a line in the middle of the file is not one of ours, or Weights & Biases does not open.
        """
        assert self._file is None, "start comes once"
        self._last_step = step
        with raise_on_all_ranks():
            if self.active:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self._drop_after(step)
                self._open()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the scalars of ``step``, counted from 1 and rising; ``memory_gib`` is added.

        Raises:
            ValueError: a value is not a finite number, or the step does not rise; nothing is written then.
        """
        if not self.active:
            return
        assert self._file is not None, "start comes before the first log"
        if step <= self._last_step:
            raise ValueError(f"Step {step} was logged after step {self._last_step}; steps must rise.")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"The metric {name} of step {step} is {value!r}; it must be a finite number.")
        if "step" in values:
            raise ValueError("A metric cannot be called step.")
        values = values | {"memory_gib": memory_gib()}
        waits = bool(self._file.waiting)
        failure = self._file.append(json.dumps({"step": step} | values, allow_nan=False))
        if failure is not None and not waits:  # said once, not every step
            print(f"warning: {self.path} cannot be written ({failure.strerror}); its lines wait.", flush=True)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        assert self._progress is not None
        self._progress.update(step, values)
        self._last_step = step

    def sync(self) -> None:
        """Flush the lines to the disk, before a checkpoint of their steps; a power cut might leave it without them."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._progress is not None:
            self._progress.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            if self._file.waiting and (failure := self._file.flush()) is not None:
                lost = self._file.waiting.count(b"\n")
                print(f"warning: {self.path} lacks the last {lost} steps ({failure.strerror}).", flush=True)
            self._file.close()
        self._progress = self._board = self._wandb = self._file = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        """Keep the lines up to ``step`` of what an earlier start left."""
        if not self.path.exists():
            return
        kept = [line for number, line in read_lines(self.path) if number <= step]
        # A new file, also where nothing is dropped: a start that lives on behind a cut link writes into the old one.
        atomic_io.replace(self.path, "".join(line + "\n" for line in kept))

    def _open(self) -> None:
        """Open the outputs."""
        wandb, tensorboard = self._wanted
        if wandb:
            self._wandb = open_wandb(self.run_dir)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Hides points of a run that was killed after its last checkpoint.
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._last_step + 1)
        self._progress = ProgressLine(self.total_steps, self._last_step)
        self._file = atomic_io.Lines(self.path)


class ProgressLine:
    """One line that says where the run is: a bar in a terminal, else a plain line now and then.

    Args:
        total: steps of the run.
        start: steps done before; the time left is reckoned from the steps after it.
        console: where to write; standard output without one.
    """

    def __init__(self, total: int, start: int, console: Console | None = None) -> None:
        self.total, self.start = total, start
        self.console = console or Console()
        self.interval = max(1, total // PLAIN_LINES)
        self.began: float | None = None
        self.progress: Progress | None = None
        self.task = TaskID(0)
        if self.console.is_terminal:
            self.progress = Progress(
                BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=self.console
            )
            self.task = self.progress.add_task("", total=total, completed=start)
            self.progress.start()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show ``step``, which has just ended."""
        text = self.text(step, values)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text)
        elif step % self.interval == 0 or step in (self.start + 1, self.total):
            print(text, file=self.console.file, flush=True)

    def text(self, step: int, values: dict[str, float]) -> str:
        """The line itself; what was not logged is left out."""
        parts = [f"step {step}/{self.total}"]
        parts += [f"{name} {values[name]:.4g}" for name in SHOWN if name in values]
        if "samples_per_s" in values:
            parts.append(f"{values['samples_per_s']:.3g} samples/s")
        if "tokens_per_s" in values:
            parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        parts.append(f"{values['memory_gib']:.2f} GiB")
        parts.append(f"ETA {self.eta(step)}")
        return "  ".join(parts)

    def eta(self, step: int) -> str:
        """Time left as h:mm:ss; unknown after the first step, which is slow and stands outside the reckoning."""
        now = time.monotonic()
        if self.began is None:
            self.began, self.start = now, step - 1
            return "?" if step < self.total else "0:00:00"
        seconds = round((now - self.began) / max(1, step - self.start - 1) * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Leave the last line standing."""
        if self.progress is not None:
            self.progress.stop()


def read_lines(path: Path) -> list[tuple[int, str]]:
    """``(step, line)`` of a metrics file; a torn last line is left out.

    Raises:
        ValueError: another line is not a JSON object with an integer step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    result = []
    for index, line in enumerate(lines[:-1]):
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {index + 1} is not a line of metrics; move the file away.") from None
        result.append((step, line))
    return result


def open_wandb(run_dir: Path) -> Any:
    """A run of Weights & Biases.

    Raises:
        ValueError: it refuses: no key or a wrong one, no server, a setting that it does not know.
    """
    import wandb

    try:
        # No git: the remote's address may hold a token, and the patch of what is not committed anything.
        settings = {"silent": True, "disable_git": True}
        return wandb.init(dir=str(run_dir), project="w2r2-ds", name=run_dir.name, settings=settings)
    except (wandb.errors.Error, ValueError) as error:  # a wrong setting is a ValueError of pydantic
        said = "; ".join(part.strip(" .") for part in re.split(r"\n|\.\s", str(error)) if part.strip(" ."))
        raise ValueError(
            f"train.wandb is true, but Weights & Biases does not start ({said}): run `wandb login`, or set "
            "WANDB_MODE=offline to log without an account."
        ) from error


def memory_gib() -> float:
    """Peak of the GPU memory allocated by this process, on a CPU of the memory that it had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage's, which begins with that of the program that started this one.
    (line,) = [line for line in PROCESS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


def require(package: str, field: str) -> None:
    """Refuse a field whose package is missing."""
    if find_spec(package) is None:
        raise ValueError(f"{field} is true, but {package} is not installed: pip install 'w2r2-ds[{package}]'.")
