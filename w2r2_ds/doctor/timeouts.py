"""Call a function with a time limit, also if it blocks in the kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def call_with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Run `call` in a thread and return its result.

    Not `signal.alarm`: a dead network mount blocks a thread in the kernel, where signals have no effect. A call that
    does not return stays in its daemon thread, so the program must end with `os._exit`.

    Raises:
        TimeoutError: the call did not return within `seconds`.
        Exception: any exception of the call.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again by `future.result()`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor would wait for its threads at exit
    if wait([future], seconds).not_done:
        raise TimeoutError(f"no result within {seconds:.0f} s")
    return future.result()


def brief(error: BaseException) -> str:
    """Type and message of an exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
