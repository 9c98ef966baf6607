"""The commands of the package: ``w2r2 NAME ...``, or ``python launchers/NAME.py ...`` in a clone.

Every command is a module here with ``main(args) -> int``. A module is imported only when its command runs, and imports
torch only after its command line has been parsed, so that ``--help`` is fast.
"""

from __future__ import annotations

import sys
from importlib import import_module

from w2r2_ds import __version__
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED

COMMANDS = {
    "train": "train a video LLM with W2R2 (also: deepspeed launchers/train.py ...)",
    "prepare": "prepare data sets, boxes and encoder features",
    "evaluate": "answer a validation set with a trained model and score the answers",
    "diagnose": "measure how far answers rely on geometry, images and chance",
    "ablate": "train and evaluate a grid of options with several seeds, and compare",
    "report": "write an HTML page about a run, or about several side by side",
    "export": "write a checkpoint as a PEFT adapter",
    "convert": "convert checkpoints of other projects",
    "doctor": "check a machine, or all nodes of a launch, before training",
    "demo": "run the whole pipeline with synthetic rooms and a tiny model",
    "bench": "run a benchmark of speed or memory",
}
"""Name -> description."""


def main(args: list[str] | None = None) -> int:
    """Run the command that the first word names; returns its exit code."""
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return DONE if words else FAILED
    if words[0] == "--version":
        print(__version__)
        return DONE
    if words[0] not in COMMANDS:
        print(f"w2r2: there is no command {words[0]!r}; use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return FAILED
    status: int = import_module(f"{__name__}.{words[0]}").main(words[1:])
    return status


def usage() -> str:
    """Text of ``w2r2 --help``."""
    lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    end = "w2r2 COMMAND --help lists the options of a command."
    return "\n".join(["usage: w2r2 COMMAND [options]", "", *lines, "", end])
