"""Progress of a long job: a progress bar on a terminal, otherwise a line of text every `SECONDS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 30.0
"""Seconds between two lines."""


@contextmanager
def progress(
    label: str, total: int, quiet: bool = False, console: Console | None = None
) -> Iterator[Callable[[], None]]:
    """Show the number of completed items.

    Args:
        label: description of the work.
        total: number of items.
        quiet: show nothing.
        console: output; standard error by default.

    Yields:
        A function to call after each item.
    """
    console = console or Console(stderr=True)
    if quiet:
        yield lambda: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _lines(label, total, console)


def _lines(label: str, total: int, console: Console) -> Callable[[], None]:
    """A function that counts items, and prints a line every `SECONDS` and after the last item."""
    done, shown = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown >= SECONDS:
            shown = time.monotonic()
            console.print(f"{label}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)

    return advance
