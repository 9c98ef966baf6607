"""How a command ends: user errors and Ctrl-C in one line on standard error, and its exit code.

It imports the standard library and light modules of `utils` only: the doctor uses it where libraries are broken.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED, INTERRUPTED
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.logging import escape_unencodable, ignore_write_errors
from w2r2_ds.utils.sanitize import message

Arguments = ParamSpec("Arguments")


def reports_errors(command: str) -> Callable[[Callable[Arguments, int | None]], Callable[Arguments, int]]:
    """Decorator of a command's ``main``: an error that the user can correct is one line and exit code 1.

    ValueError is invalid input; OSError is a folder that cannot be written, or a full disk. Ctrl-C is one line and exit
    code 130. Text that the encoding of an output cannot represent is escaped. A ``main`` without a result exits with 0.
    """

    def decorate(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def run(*args: Arguments.args, **options: Arguments.kwargs) -> int:
            escape_unencodable()
            ignore_write_errors("stderr")
            try:
                return main(*args, **options) or DONE
            except (ValueError, OSError) as error:
                return report_error(command, error)
            except KeyboardInterrupt:
                if RankInfo.from_environment().rank == 0:  # all ranks receive the Ctrl-C of a terminal
                    print(f"w2r2 {command}: interrupted; the same command keeps finished work.", file=sys.stderr)
                return INTERRUPTED

        return run

    return decorate


def report_error(command: str, error: Exception) -> int:
    """Print a user error in one line on standard error; returns the exit code."""
    print(f"w2r2 {command}: {error_text(error)}", file=sys.stderr)
    return FAILED


def error_text(error: Exception) -> str:
    """Message of an error; an error of the operating system as ``FILE: cause.``"""
    if isinstance(error, OSError) and error.strerror:
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
        return message(f"{files}: {error.strerror}." if files else f"{error.strerror}.")
    return message(error)
