"""Exit codes of training; the batch scripts in slurm/ decide by them whether a job is requeued.

The scripts source slurm/exit_codes.sh, which states the same codes: the batch shell may have no Python, since the
environment can be in a container that only the ranks run in.
"""

from __future__ import annotations

DONE = 0
"""All steps are done and the last checkpoint is written."""
FAILED = 1
"""A user's mistake or a loss that is not finite. The same command would end in the same way, so never requeued."""
LOST = 75
"""A rank died, hung or was unreachable, or an unexpected exception was raised. Another start may help."""
REQUEUE = 85
"""Stopped by SIGUSR1 (time limit or preemption) after a checkpoint; the job is to continue."""
TERMINATED = 143
"""Stopped by SIGTERM (scancel, or preemption announced by SIGTERM) after a checkpoint; the job is not requeued. The
value is 128 + 15, as a shell reports it."""


class RetryableError(RuntimeError):
    """The network or another process of this run prevents training; ends the process with `LOST`."""
