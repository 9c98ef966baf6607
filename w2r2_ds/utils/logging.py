"""Set up the package's logger: messages on standard error, with the rank where there are several.

Standard output is left to a command's result (a table, JSON), so that it can be piped.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO

from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.sanitize import lines, without_secrets

LOGGER = "w2r2_ds"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time of the message: it may have been replaced since `setup_logging`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """Escapes control characters and hides credentials: messages quote annotation files, models and URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(without_secrets(super().format(record)))


class _DeepSpeedFilter(logging.Filter):
    """Hand DeepSpeed's warnings to the package's handler: its own handler writes to standard output.

    One of them is dropped: while it is imported on a machine without a GPU, DeepSpeed warns that it found none.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.funcName != "get_accelerator":
            for handler in logging.getLogger(LOGGER).handlers:
                handler.handle(record)
        return False


_DEEPSPEED_FILTER = _DeepSpeedFilter()  # one object: a logger keeps a filter only once


def setup_logging(ranks: RankInfo | None = None) -> None:
    """Send the package's and DeepSpeed's log messages to standard error.

    INFO and above on rank 0, warnings on the other ranks; of DeepSpeed only warnings.

    Args:
        ranks: this process among the ranks; by default as the launcher's environment variables say.
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


class IgnoreWriteErrors:
    """A text stream that drops what cannot be written, for example because the disk under a log file is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write or drop a text; return its length."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_write_errors() -> None:
    """Keep this process running when standard output or standard error cannot be written (a full disk)."""
    sys.stdout, sys.stderr = IgnoreWriteErrors(sys.stdout), IgnoreWriteErrors(sys.stderr)  # type: ignore[assignment]
