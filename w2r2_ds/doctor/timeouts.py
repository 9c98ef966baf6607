"""Nothing hangs: a call with a time limit, and an alarm for the whole program.

Both are threads of Python, which stand still while a call into a library or driver holds Python's lock. Behind them is
a thread of C (faulthandler), which ends the process with exit status 1 and ``Timeout (...)!`` before the stacks of
all threads: whoever stands at the top of one holds the lock, or waits for a file that does not answer.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


STARTED = time.monotonic()
"""When this process began, as exactly as matters here."""
GRACE = 5.0
"""Seconds after the alarm at which the thread of C ends a process whose alarm could not ring."""
STILL = 4.0
"""Seconds without any work after which a call whose time is over is said to hang."""


class TooLong(Exception):
    """A call did not end in its time; it goes on in a thread that ends with the program.

    Args:
        works: it was still doing something, so that it is slow and does not hang.
    """

    def __init__(self, works: bool) -> None:
        super().__init__()
        self.works = works


def bounded(call: Callable[[], T], seconds: float, at_most: float = 0.0) -> T:
    """The result of a call, or its exception.

    A dead network mount holds a process in the kernel, where no signal reaches it; hence a thread that is left behind.

    Args:
        call: what to do, in a thread.
        seconds: that it may take.
        at_most: seconds that it may take as long as it works and does not only wait; 0 for no more than `seconds`.

    Raises:
        TooLong: it has not ended in that time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # handed on to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + max(seconds, at_most)
    thread.join(max(0.0, seconds - STILL))
    while thread.is_alive():
        before = work(f"self/task/{thread.native_id}")
        thread.join(max(0.0, min(STILL, end - time.monotonic())))
        works = work(f"self/task/{thread.native_id}") != before
        if thread.is_alive() and (not works or time.monotonic() >= end):
            raise TooLong(works)
    if errors:
        raise errors[0]
    return results[0]


def work(process: str) -> tuple[str, ...]:
    """What a process or thread (below /proc) has done: time on a CPU or waiting for one, bytes read.

    Equal twice, it did nothing in between and had nothing to do.
    """
    try:
        times = Path(f"/proc/{process}/schedstat").read_text().split()[:2]
        read = Path(f"/proc/{process}/io").read_text().splitlines()[0]
    except (OSError, IndexError):  # it has just ended
        return ()
    return (*times, read)


def last_resort(seconds: float) -> None:
    """End the process in that time, whoever holds Python's lock; the last call counts."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


class Alarm:
    """Ends the program when its time is over, and says what it was doing.

    Args:
        seconds: for everything.
        host: this node, for the sentence.
    """

    def __init__(self, seconds: float, host: str) -> None:
        self.doing = "starting"
        self.listener: Callable[[str], None] | None = None
        self._host = host
        self._timer: threading.Timer | None = None
        self.renew(seconds)

    def renew(self, seconds: float, since: float | None = None) -> None:
        """Begin again.

        Args:
            seconds: for everything from now on.
            since: reading of the monotonic clock from which they count, by default now.
        """
        self._stop()
        self._seconds, self._started = seconds, time.monotonic() if since is None else since
        self._timer = threading.Timer(self.left(), self._ring)
        self._timer.daemon = True
        self._timer.start()
        last_resort(self.left() + GRACE)

    def left(self, end: float | None = None) -> float:
        """Seconds until `end` seconds after the start, by default until the alarm; never negative."""
        until = self._seconds if end is None else end
        return max(0.0, self._started + until - time.monotonic())

    def now(self, doing: str) -> None:
        """What is being done, for the alarm and for whoever listens."""
        self.doing = doing
        if self.listener is not None:
            self.listener(doing)

    def off(self) -> None:
        """No alarm any more."""
        self._stop()
        faulthandler.cancel_dump_traceback_later()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        print(
            f"doctor: {self._host} was not done after {self._seconds:.0f} s, while {self.doing}; look there, or leave "
            "this node out.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # other threads may be stuck in the kernel


def brief(error: BaseException) -> str:
    """What an exception says, on one line, with its kind, short enough for a table."""
    text: Any = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
