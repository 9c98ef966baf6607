"""Detect host-device synchronisation on the CPU, by the operators that would wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
"""Operators that wait for the device: they read a value, or their output shape depends on values."""


def host_reads(function: Callable[[], object]) -> set[str]:
    """Names of the synchronising operators that `function` calls, backward pass included."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return READS & {event.name for event in record.events() or ()}


def host_constants(function: Callable[[], object]) -> list[str]:
    """Constants of Python that `function` copies to the device of another tensor, which makes the host wait as well.

    These are the calls of `torch.tensor` and `torch.as_tensor` with a device, and the indices that are lists.
    """
    with HostConstants() as constants:
        function()
    return constants.found


class HostConstants(TorchFunctionMode):
    """Records the constants in `found`; see `host_constants`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and given.get("device") is not None:
            self.found.append(f"{func.__name__} {args}")
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            self.found += [f"index {each}" for each in index if isinstance(each, list)]
        return func(*args, **given)
