"""The demo: ``python launchers/demo.py``, or ``make demo``."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from w2r2_ds.config.cli import Parser
from w2r2_ds.demo.run import run_demo
from w2r2_ds.utils.sanitize import message

if __name__ == "__main__":
    try:
        auto_cli(run_demo, as_positional=False, parser_class=Parser)
    except ValueError as error:
        sys.exit(f"demo.py: {message(error)}")
