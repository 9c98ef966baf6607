"""Look before you train: ``python launchers/doctor.py [--config RECIPE ... any option of train.py]``.

Without options it looks at this machine alone. In a launch (slurm/rank.sh, deepspeed, torchrun) it looks at every node
and compares them. Exit status 1 if anything is wrong, within a minute of the last node's import of torch; for nodes
that import it from a slow file system it waits four more at most. ``Timeout (...)!`` with stacks means that a call into
a file system, library or driver did not come back: the top of the stacks says which.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
from pathlib import Path

READING = 120.0
"""Seconds to find this project and to read the command line; a recipe may lie on a file system that is dead."""
if __name__ == "__main__":  # before anything is read
    faulthandler.enable()  # a library that crashes is named by the traceback
    faulthandler.dump_traceback_later(READING, exit=True)

try:
    import w2r2_ds  # noqa: F401
except ImportError:  # not installed, which the doctor then reports
    sys.path.insert(0, str(Path(__file__).parents[1]))

from w2r2_ds.doctor.checks import DoctorRequest  # noqa: E402
from w2r2_ds.doctor.run import examine  # noqa: E402


def read_arguments(args: list[str]) -> DoctorRequest:
    """What a command line of train.py asks for; in a launch, a refused one is reported with the node's name."""
    from w2r2_ds.config.io import config_first, from_tree, train_parser

    options = train_parser("Look at this machine, or at every node of a launch, before training.", args, False)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            tree = options.parse_args(config_first(args)).as_dict()
        config = from_tree(tree)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        return DoctorRequest(None, "", [], refused=said.getvalue().strip())
    except ValueError as error:
        return DoctorRequest(None, "", [], refused=str(error))
    ds_path = tree["deepspeed"] or ""
    recipes = [str(path) for path in tree.get("config") or []]
    asks_run = any(arg.startswith("--") and not arg.startswith(("--deepspeed", "--local_rank")) for arg in args)
    return DoctorRequest(config if asks_run else None, ds_path, [*recipes, *([ds_path] if ds_path else [])])


def main(args: list[str]) -> int:
    """Read the command line and look; a library that the command line needs and that is broken is reported too."""
    try:
        asked = read_arguments(args)
    except ImportError as error:
        asked = DoctorRequest(None, "", [], refused=f"the command line cannot be read without {error.name} ({error}).")
    return examine(asked)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a check that hangs in the kernel is left behind in its thread
