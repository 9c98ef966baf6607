"""Standard output and error that a full disk cannot stop: what does not go through is dropped, and the program goes on.

Logs of jobs are files, mostly on the disk that a run fills; a warning that the disk is full must not end the run.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


class Lossy:
    """A text stream whose errors of writing are swallowed; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop, a text; returns its length."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_going() -> None:
    """Let nothing that this process prints end it."""
    sys.stdout, sys.stderr = Lossy(sys.stdout), Lossy(sys.stderr)  # type: ignore[assignment]
