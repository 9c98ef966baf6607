"""Fault injection inside a rank's process, at a given forward of the training step.

`install` replaces `W2R2Step.forward`, because the package has no hooks for faults. tests/faults/fault_runs.py calls it
before the training script runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

MARK = "fault at"
"""Prefix of the log line with the fault's time.monotonic(). All processes of a machine share this clock."""


def install(kind: str, call: int, seconds: float = 0.0) -> None:
    """Inject a fault into one forward of the training step.

    Args:
        kind: ``forward``, ``backward``: SIGKILL half way through it; ``nan``: the first sample's loss is NaN;
            ``sleep``: this forward sleeps for `seconds`; ``slow``: this and all later forwards do.
        call: number of the forward, from 1; forward 1 is the dry run's.
        seconds: duration of a sleep.
    """
    from w2r2_ds.training.step import W2R2Step

    real: Callable[..., Any] = W2R2Step.forward
    calls = 0

    def forward(self: Any, batch: Any, mode: Any = "loss", **more: Any) -> Any:
        nonlocal calls
        if mode != "loss":
            return real(self, batch, mode, **more)
        calls += 1
        if calls == call and kind == "forward":
            middle_layer(self).register_forward_pre_hook(lambda *_: die())
        if (calls == call and kind == "sleep") or (calls >= call and kind == "slow"):
            stamp()
            time.sleep(seconds)
        loss, stats = real(self, batch, mode, **more)
        if calls == call and kind == "nan":
            stamp()
            stats[0, 0] = float("nan")
            loss = loss * float("nan")
        if calls == call and kind == "backward":
            # This hook runs when the later half of the decoder layers already has its gradients.
            weights = [weight for weight in middle_layer(self).parameters() if weight.requires_grad]
            weights[0].register_hook(lambda _: die())
        return loss, stats

    W2R2Step.forward = forward  # type: ignore[method-assign]


def middle_layer(step: Any) -> Any:
    """The middle decoder layer."""
    layers = step.model.base.model.language_model.layers
    return layers[len(layers) // 2]


def die() -> None:
    """Send SIGKILL to the own process, as the kernel's out-of-memory killer does."""
    stamp()
    os.kill(os.getpid(), signal.SIGKILL)


def stamp() -> None:
    """Log the time of the fault."""
    print(MARK, time.monotonic(), flush=True)
