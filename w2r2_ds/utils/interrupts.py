"""Ctrl-C in a command with worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Context in which worker processes are started that ignore SIGINT; this process ignores it meanwhile.

    A terminal sends Ctrl-C to all processes of a command. This process ends its workers, which would print a traceback
    each. A new process inherits that a signal is ignored, also one that is still importing its modules.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
