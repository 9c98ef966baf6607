"""Check before training: ``python launchers/doctor.py [--config RECIPE ... any option of train.py]``.

Without options it checks this machine. In a launch (slurm/rank.sh, deepspeed, torchrun) it checks every node and
compares them. The exit status is 1 if anything is wrong. It waits up to four minutes for ranks that still import torch.
``Timeout (...)!`` with stacks means that a call into a file system, library or driver did not return: the top of the
stacks names it.
"""

from __future__ import annotations

import contextlib
import io
import sys

from w2r2_ds.doctor.checks import DoctorRequest
from w2r2_ds.doctor.run import examine


def main(args: list[str] | None = None) -> int:
    """Run all checks; returns 0 if nothing is wrong. An unreadable command line is one of the findings."""
    try:
        request = read_arguments(sys.argv[1:] if args is None else args)
    except ImportError as error:
        reason = f"the command line cannot be read without {error.name} ({error})."
        request = DoctorRequest(None, "", [], refused=reason)
    return examine(request)


def read_arguments(args: list[str]) -> DoctorRequest:
    """Read a command line of train.py. In a launch, an error in it is reported with the node's name."""
    # Imported here, so that a broken library is reported like any other finding.
    from w2r2_ds.commands.common import add_plugin_option
    from w2r2_ds.config.io import config_first, from_tree, train_parser
    from w2r2_ds.utils.plugins import import_plugins

    errors = io.StringIO()
    try:
        args = import_plugins(args)
        options = train_parser("Check this machine, or every node of a launch, before training.", args, False)
        options.prog = "w2r2 doctor"
        add_plugin_option(options)
        with contextlib.redirect_stderr(errors):
            tree = options.parse_args(config_first(args)).as_dict()
        config = from_tree(tree)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        return DoctorRequest(None, "", [], refused=errors.getvalue().strip())
    except ValueError as error:
        return DoctorRequest(None, "", [], refused=str(error))
    ds_path = tree["deepspeed"] or ""
    recipes = [str(path) for path in tree.get("config") or []]
    asks_run = any(arg.startswith("--") and not arg.startswith(("--deepspeed", "--local_rank")) for arg in args)
    return DoctorRequest(config if asks_run else None, ds_path, [*recipes, *([ds_path] if ds_path else [])])
