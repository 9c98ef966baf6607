"""Faults that a rank injects into itself at a given moment of a training step, without hooks in production code.

Imported in the rank's process (tests/faults/fault_runs.py) before the script runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

MARK = "fault at"
"""In the rank's log, before the time.monotonic() of the fault, which is the same clock for all of a machine."""


def install(kind: str, call: int, seconds: float = 0.0) -> None:
    """Let fault `kind` happen in forward `call` of the training step, from 1; the first is the dry run's.

    Args:
        kind: ``forward`` or ``backward``: SIGKILL in the middle of it; ``nan``: the first sample's loss is not finite;
            ``sleep``: nothing happens for `seconds` in this forward; ``slow``: in it and all later ones.
        call: which forward.
        seconds: of ``sleep`` and ``slow``.
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
            # When the gradient of a weight in the middle comes, the later half of the model has its own.
            weights = [weight for weight in middle_layer(self).parameters() if weight.requires_grad]
            weights[0].register_hook(lambda _: die())
        return loss, stats

    W2R2Step.forward = forward  # type: ignore[method-assign]


def middle_layer(step: Any) -> Any:
    """The decoder layer half way up."""
    layers = step.model.base.model.language_model.layers
    return layers[len(layers) // 2]


def die() -> None:
    """As the kernel's out-of-memory killer does it."""
    stamp()
    os.kill(os.getpid(), signal.SIGKILL)


def stamp() -> None:
    """Say when it happens."""
    print(MARK, time.monotonic(), flush=True)
