"""Call a function with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def call_with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Return the result of `call`, which runs in a thread.

    A dead network mount blocks a process in the kernel, where no signal reaches it. So a call that does not return is
    left behind in its daemon thread, and the program must end with `os._exit`.

    Raises:
        TimeoutError: the call did not return in time.
        Exception: what the call raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def brief(error: BaseException) -> str:
    """Type and message of an exception on one line, cut to 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
