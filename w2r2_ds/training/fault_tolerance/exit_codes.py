"""Exit codes of launchers/train.py; slurm/ decides by them whether a job is queued again."""

from __future__ import annotations

import torch

DONE = 0
"""All steps are done, and the last checkpoint is written."""
FAILED = 1
"""A mistake that the user can mend, or a loss that is not finite; starting again would end alike: never requeued."""
LOST = 75
"""A rank died, hung or cannot be reached, or something unforeseen was raised; starting again may help."""
REQUEUE = 85
"""Stopped by SIGUSR1 after a checkpoint: the time is up, and the job wants to go on where it is."""
TERMINATED = 143
"""Stopped by SIGTERM after a checkpoint: whoever sent it decides whether the job goes on (128 + 15, as of a shell)."""

MISTAKES = (ValueError, FloatingPointError, torch.OutOfMemoryError)
"""What ends a run with `FAILED`: the same samples would use up the memory again."""


class Unreachable(RuntimeError):
    """Ends a run with `LOST` and one sentence: the network or another start is in the way, and a restart may help."""
