"""Check a machine or a launch before training: ``w2r2 doctor [--config RECIPE] [any option of w2r2 train]``.

Without options it checks this machine. In a launch (slurm/rank.sh, deepspeed, torchrun) it checks every node and
compares them. It waits up to four minutes for ranks that still import torch. ``Timeout (...)!`` with stack traces means
that a call into a file system, library or driver did not return; the top of the trace shows which.
"""

from __future__ import annotations

import sys

from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.doctor.checks import DoctorRequest
from w2r2_ds.doctor.run import examine


@reports_errors("doctor")
def main(args: list[str] | None = None) -> int:
    """Run all checks; returns 0 if there are no errors. An invalid command line is an error of this node."""
    try:
        request = read_arguments(sys.argv[1:] if args is None else args)
    except ImportError as error:
        reason = f"the command line cannot be read without {error.name} ({error})."
        request = DoctorRequest(None, "", [], command_error=reason)
    return examine(request)


def read_arguments(args: list[str]) -> DoctorRequest:
    """Parse the options of `w2r2 train`; an error is stored in the request, to be reported with the node's name."""
    # Imported here, so that a broken library is reported like any other error.
    from w2r2_ds.commands.common import add_plugin_option
    from w2r2_ds.config.io import parse_run, run_parser
    from w2r2_ds.utils.plugins import import_plugins

    parser = run_parser("Check this machine, or every node of a launch, before training.", "w2r2 doctor")
    add_plugin_option(parser)
    parser.add_argument("--deepspeed", default="", help="DeepSpeed JSON of the run.")
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher.")
    parser.exit_on_error = False  # raise ValueError instead
    try:
        args = import_plugins(args)
        config, options = parse_run(parser, args)
    except ValueError as error:
        return DoctorRequest(None, "", [], command_error=str(error))
    files = [path for path in (options.config, options.deepspeed) if path]
    has_run_options = any(arg.startswith("--") and not arg.startswith(("--deepspeed", "--local_rank")) for arg in args)
    return DoctorRequest(config if has_run_options else None, options.deepspeed, files)
