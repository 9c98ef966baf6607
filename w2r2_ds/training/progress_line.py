"""Progress of a run on standard output: a progress bar in a terminal, otherwise a line of text every few steps."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SHOWN = ("loss", "align", "det", "push", "s_short", "s_fused")
"""Metrics on the progress line."""
TEXT_LINES = 50
"""Number of lines per run without a terminal."""


class ProgressLine:
    """Shows step, main metrics, speed, memory and remaining time.

    Args:
        total: number of steps of the run.
        start: steps completed before this launch.
        console: output; standard output by default.
    """

    def __init__(self, total: int, start: int, console: Console | None = None) -> None:
        self.total, self.start = total, start
        self.console = console or Console()
        self.interval = max(1, total // TEXT_LINES)
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
        """Show the metrics of `step`."""
        text = self.text(step, values)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text)
        elif step % self.interval == 0 or step in (self.start + 1, self.total):
            print(text, file=self.console.file, flush=True)

    def text(self, step: int, values: dict[str, float]) -> str:
        """The line of a step, without metrics that were not logged."""
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
        """Remaining time as h:mm:ss; "?" after the first step, which is slow and excluded from the average."""
        now = time.monotonic()
        if self.began is None:
            self.began, self.start = now, step - 1
            return "?" if step < self.total else "0:00:00"
        seconds = round((now - self.began) / max(1, step - self.start - 1) * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Stop the progress bar; its last state stays on the screen."""
        if self.progress is not None:
            self.progress.stop()
