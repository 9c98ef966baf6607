"""Ctrl-C while worker processes are started: the handler and its flags are those from before."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from w2r2_ds.training.fault_tolerance.signals import CODES, StopSignals
from w2r2_ds.utils.interrupts import defer_interrupts
from w2r2_ds.utils.parallel import run_all


def read_interrupted() -> int:
    """Return value of a `read` in compiled code during which SIGINT comes: -1 if it fails with EINTR."""
    reader, writer = os.pipe()
    interrupt = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    write = threading.Timer(0.6, os.write, [writer, b"x"])
    for timer in (interrupt, write):
        timer.start()
    size: int = ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
    for timer in (interrupt, write):
        timer.join()
    os.close(reader)
    os.close(writer)
    return size


def test_system_calls_are_still_restarted_in_a_run() -> None:
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        with StopSignals() as signals:
            with defer_interrupts():
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) == signals._handle
            assert read_interrupted() == 1
            assert signals.code == CODES[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_interrupt_in_the_context_is_raised_after_it() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached = True
        assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_worker_processes_can_be_started_in_another_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: list(run_all(abs, [(-1,), (-1,)], workers=2))).result() == [1, 1]
