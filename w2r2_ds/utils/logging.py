"""Set up the package's logger: messages on standard error, with the rank in a distributed run.

Standard output is only for the result of a command (a table, JSON), so that it can be piped.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.sanitize import lines, without_secrets

LOGGER = "w2r2_ds"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Handler for the current `sys.stderr`, which may be another object than at the time of `setup_logging`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """Formatter that escapes control characters and hides credentials: messages quote untrusted files and URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(without_secrets(super().format(record)))


class _DeepSpeedFilter(logging.Filter):
    """Redirect DeepSpeed's warnings to the package's handler, because its own handler writes to standard output.

    Its warning about a missing GPU at import is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.funcName != "get_accelerator":
            for handler in logging.getLogger(LOGGER).handlers:
                handler.handle(record)
        return False


_DEEPSPEED_FILTER = _DeepSpeedFilter()  # one object: a logger keeps a filter only once


def setup_logging(ranks: RankInfo | None = None) -> None:
    """Send the package's and DeepSpeed's log messages to standard error.

    INFO and above on rank 0, warnings on the other ranks; of DeepSpeed only warnings. Deprecation warnings of one
    library about another are not shown.

    Args:
        ranks: rank of this process; default: from the launcher's environment variables.
    """
    ranks = ranks or RankInfo.from_environment()
    rank = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(f"%(asctime)s {rank}%(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger(LOGGER)
    # A second call replaces the handler; a second handler would write every message twice.
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if ranks.rank == 0 else logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_DEEPSPEED_FILTER)
    for library in ("torch", "transformers", "peft", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")


class IgnoreWriteErrors:
    """Text stream that ignores write errors, for example of a log file on a full disk."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it on an error; returns its length."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; errors are ignored."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_write_errors(*names: str) -> None:
    """Ignore write errors of the named streams of this process (``stdout``, ``stderr``), for example on a full disk."""
    for name in names:
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, IgnoreWriteErrors):
            setattr(sys, name, IgnoreWriteErrors(stream))


def escape_unencodable() -> None:
    r"""Escape characters that the encoding of standard output or error lacks (``\u2501``), instead of an exception.

    The encoding may be latin-1 or ASCII, by the locale or PYTHONIOENCODING. Progress bars have box characters, and
    names of files and objects may be in any script.
    """
    for stream in (sys.stdout, sys.stderr):
        # A test or a notebook may have replaced the stream with one without an encoding; None is a closed descriptor.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Context in which this process writes everything for standard output to standard error.

    For a command whose standard output is JSON: libraries print while they are imported or run. The file descriptor is
    redirected too, for compiled libraries and child processes. If the caller has closed one of the two (``>&-``), its
    descriptor may belong to another file by now, and is left alone.
    """
    if sys.stdout is None or sys.stderr is None:
        with redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what compiled code has printed may still be in the buffer of C's stdout
        os.dup2(saved, 1)
        os.close(saved)
