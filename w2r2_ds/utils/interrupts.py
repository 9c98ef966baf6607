"""Ctrl-C in a command with worker processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

PYTHON_HANDLERS = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN)
"""Handlers of SIGINT of a Python process that has set none."""


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Context in which worker processes are started that ignore SIGINT; this process handles it after the context.

    A terminal sends Ctrl-C to all processes of a command. This process ends its workers, which would print a traceback
    each. A new process inherits that a signal is ignored, also one that is still importing its modules. Python can set
    handlers in the main thread only; in another thread this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal when the first worker is started
    # Linux keeps a blocked signal pending, although it is ignored.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if before not in PYTHON_HANDLERS:
            # `signal.signal` disables SA_RESTART, which `training.fault_tolerance.signals` has enabled for its handler.
            signal.siginterrupt(signal.SIGINT, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
