"""Exit codes of training, by which the batch scripts in slurm/ decide whether a job is requeued.

The scripts source slurm/exit_codes.sh, which has the same codes: the batch shell may have no Python, since the
environment may be in a container in which only the ranks run.
"""

from __future__ import annotations

DONE = 0
"""All steps are done and the last checkpoint is written."""
FAILED = 1
"""An error that the user must correct, or a loss that is not finite. The same command would end in the same way, so the
job is never requeued."""
LOST = 75
"""A rank died, hung or was unreachable, or an unexpected exception was raised. Another launch may succeed."""
REQUEUE = 85
"""Stopped by SIGUSR1 (time limit or preemption) after a checkpoint; the job is requeued."""
INTERRUPTED = 130
"""Ended at once by Ctrl-C (SIGINT), as a shell reports it: 128 + 2. Training ends so at the second Ctrl-C only."""
TERMINATED = 143
"""Stopped by SIGTERM (scancel, or preemption announced by SIGTERM) after a checkpoint; the job is not requeued. The
value is 128 + 15, as a shell reports it."""


class RetryableError(RuntimeError):
    """An error of the network or of another process of this run; ends the process with `LOST`."""
