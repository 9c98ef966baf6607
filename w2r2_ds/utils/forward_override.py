"""Temporary replacement of the forward of one module instance; its class and parameter names are unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which `module` runs ``forward(inner, *args, **kwargs)``; `inner` is its previous forward.

    Overrides nest: the previous forward may itself be an override.
    """
    # Hooks, also ZeRO-3's, belong to `module.__call__` and still run once per call. ZeRO-3 therefore keeps the
    # parameters gathered while `forward` runs, however often that calls `inner`.
    was_overridden, inner = "forward" in vars(module), module.forward
    # An attribute of the instance takes precedence over the method of the class.
    module.forward = functools.partial(forward, inner)
    try:
        yield
    finally:
        if was_overridden:
            module.forward = inner
        else:
            del module.forward
