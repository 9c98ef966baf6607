"""Detect host-device synchronisation without a device, by the operators that read a value."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
"""Operators that make the host wait: they read a value, or their output shape depends on values."""


def host_reads(function: Callable[[], object]) -> set[str]:
    """Names of the host's reads while `function` runs, its backward pass included; on the CPU they cost nothing."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return READS & {event.name for event in record.events() or ()}
