"""Detect host-device synchronisation on the CPU, by the operators that would wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
"""Operators that wait for the device: they read a value, or their output shape depends on values."""


def host_reads(function: Callable[[], object]) -> set[str]:
    """Names of the synchronising operators that `function` calls, backward pass included."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return READS & {event.name for event in record.events() or ()}
