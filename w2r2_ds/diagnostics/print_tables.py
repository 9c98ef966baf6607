"""Print the results of a diagnosis as tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from w2r2_ds.diagnostics.table1 import OVERALL
from w2r2_ds.utils.sanitize import one_line

WIDTH = 110
"""Width of the tables in characters if standard output is no terminal."""


def print_table1(result: Mapping[str, Any]) -> None:
    """Print one table per protocol and group: scores times 100 of every row, and what the first row gains on others."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    rows, cells, differences = (result["table1"][key] for key in ("rows", "cells", "differences"))
    for protocol, group in dict.fromkeys((cell["protocol"], cell["group"]) for cell in cells):
        own = {(cell["row"], cell["metric"]): cell for cell in cells if _is_of(cell, protocol, group)}
        to_first = [each for each in differences if _is_of(each, protocol, group) and each["row"] == rows[0]["row"]]
        gains = {(each["minus"], each["metric"]): each for each in to_first}
        metrics = list(dict.fromkeys(metric for _, metric in own))
        counts = next(iter(own.values()))
        console.print(Text(one_line(f"{protocol}, {group}: {counts['samples']} samples of {counts['scenes']} scenes")))
        table = Table()
        table.add_column("answers", overflow="fold")
        for metric in metrics:
            table.add_column(metric, justify="right")
        if group == OVERALL:  # the share is not known by group
            table.add_column("parsed", justify="right")
        for row in rows:
            values = [_score(own[row["row"], metric]) for metric in metrics]
            # Text, not str: labels come from the command line and may contain rich's markup.
            parsed = [f"{row['parsed'][protocol]:.1%}"] if group == OVERALL else []
            table.add_row(Text(one_line(row["label"])), *map(Text, values), *parsed)
        table.add_section()
        for row in rows[1:]:
            values = [_score(gains.get((row["row"], metric)), signed=True) for metric in metrics]
            label = f"{rows[0]['label']} minus {row['label']}"
            table.add_row(Text(one_line(label)), *map(Text, values))
        console.print(table)
    for name, reason in result["not_evaluated"].items():
        console.print(Text(one_line(f"{name}: not evaluated, {reason}")))
    console.print(
        "Scores times 100, with 95 % intervals over scenes; of n/a, the results have the reason.", markup=False
    )


def print_causality(result: Mapping[str, Any]) -> None:
    """Print one table per kind of intervention: a row per number of the box. Nothing without interventions."""
    causality = result.get("causality")
    if causality is None:
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    for kind, measures in causality["interventions"].items():
        _print_numbers(console, f"{kind}: {measures['samples']} samples", measures)
    for shift, measures in causality["paired"].items():
        _print_numbers(console, f"geometry of the paired room ({shift})", measures)
    _print_removed(console, causality["removed_frame"])
    for name, each in causality["replaced"].items():
        console.print(Text(one_line(f"answers unchanged under {name}: {_measure(each['unchanged'])}")))
    for kind, reason in causality["not_evaluated"].items():
        console.print(Text(one_line(f"do(F3D), {kind}: not evaluated, {reason}")))


def _print_numbers(console: Console, name: str, measures: Mapping[str, Any]) -> None:
    """One table: slope, correlation and share of following answers of every number of the box."""
    counts = f"{measures['compared']} of {measures['rows']} answers compared"
    console.print(Text(one_line(f"do(F3D), {name}, {counts}")))
    table = Table()
    for column in ("number", "slope", "correlation", "follows"):
        table.add_column(column, justify="left" if column == "number" else "right")
    for number, each in measures["numbers"].items():
        if each["rows"]:
            values = [_measure(each.get(column)) for column in ("slope", "correlation", "follows")]
            table.add_row(number, *map(Text, values))
    console.print(table)


def _print_removed(console: Console, removed: Mapping[str, Any]) -> None:
    """One table: movement of the answers without the geometry of one frame, by number of frames with the target."""
    if not removed:
        return
    console.print("do(F3D), geometry of one frame removed", markup=False)
    table = Table()
    for column in ("removed frame", "frames with the target", "samples", "moved (m)", "unchanged"):
        table.add_column(column, justify="left" if column == "removed frame" else "right")
    for which, measures in removed.items():
        for group, each in {"all": measures, **measures["by_frames"]}.items():
            values = str(each["samples"]), _measure(each["moved"]), _measure(each["unchanged"])
            table.add_row(which, group, *map(Text, values))
    console.print(table)


def print_cues(result: Mapping[str, Any]) -> None:
    """Print the shares of answers that follow the truth and the cue of a shifted split. Nothing for other sets."""
    if "cues" not in result:
        return
    table = Table()
    for column in ("answers", "scored", "truth", "cue", "neither"):
        table.add_column(column, justify="left" if column == "answers" else "right")
    labels = {row["row"]: row["label"] for row in result["table1"]["rows"]}
    for row, measures in result["cues"].items():
        shares = [_measure(measures["iou"][name]) for name in ("truth", "cue", "neither")]
        table.add_row(Text(one_line(labels[row])), str(measures["iou"]["scored"]), *map(Text, shares))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    console.print("answers that follow the 2D cue of this shifted split (IoU)", markup=False)
    console.print(table)


def _measure(estimate: Mapping[str, Any] | None) -> str:
    """``0.12 [0.10, 0.14]``"""
    if estimate is None or estimate["value"] is None:
        return "n/a"
    interval = "n/a" if estimate["low"] is None else f"{estimate['low']:.2f}, {estimate['high']:.2f}"
    return f"{estimate['value']:.2f} [{interval}]"


def _is_of(cell: Mapping[str, Any], protocol: str, group: str) -> bool:
    return (cell["protocol"], cell["group"]) == (protocol, group)


def _score(cell: Mapping[str, Any] | None, signed: bool = False) -> str:
    """``12.3 [10.1, 14.6]``"""
    if cell is None or cell["value"] is None:
        return "n/a"
    sign = "+" if signed else ""
    interval = "n/a" if cell["low"] is None else f"{100 * cell['low']:{sign}.1f}, {100 * cell['high']:{sign}.1f}"
    return f"{100 * cell['value']:{sign}.1f} [{interval}]"
