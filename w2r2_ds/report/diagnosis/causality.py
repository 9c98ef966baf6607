"""Geometric causality: how far every number of the box follows the changed geometry."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from plotly.graph_objects import Figure, Scatter

from w2r2_ds.diagnostics.causality.measures import NUMBERS, summary
from w2r2_ds.report.collect import title_of
from w2r2_ds.report.curves import COLORS
from w2r2_ds.report.diagnosis.parts import Part, Plot, add_guide, measure_cell, style
from w2r2_ds.report.scores import Cell, ScoreTable

INTERVENTIONS = {
    "scale": "scaled room",
    "shift": "shifted room",
    "turn": "turned room",
    "removed_frame": "one frame removed",
}
"""Kind of intervention -> label."""
REPLACED = {"zero": "geometry removed", "shuffle": "geometry of another scene"}
"""Replacement of the geometry -> label."""
REMOVED = {"target": "frame with the target", "other": "frame without the target"}
"""Removed frame -> label."""
RANGE = (-0.3, 1.3)
"""Smallest range of the axis of slopes."""
WIDEST = (-1.0, 2.0)
"""Largest range; intervals of few answers may be far wider, and would flatten all others."""


def causality_part(diagnosis: Mapping[str, Any]) -> Part | None:
    """Slopes as a plot, all measures as tables; None if the file has no causality.

    Args:
        diagnosis: content of a file of ``w2r2 diagnose``.
    """
    causality = diagnosis.get("causality")
    if causality is None:
        return None
    kinds = {INTERVENTIONS.get(kind, kind): measures for kind, measures in causality["interventions"].items()}
    # Files of earlier versions have neither of the other two.
    paired = causality.get("paired") or {}
    kinds |= {f"geometry of the paired room ({shift})": measures for shift, measures in paired.items()}
    tables = [_table(label, measures) for label, measures in kinds.items()]
    if removed := causality.get("removed_frame"):
        tables.append(_removed_table(removed))
    if causality["replaced"]:
        tables.append(_replaced_table(causality["replaced"]))
    slopes = _slopes(kinds)
    plots = [Plot("Slope of every number of the box, 95 % intervals", slopes)] if slopes.data else []
    reasons = [f"{INTERVENTIONS.get(kind, kind)}: {reason}" for kind, reason in causality["not_evaluated"].items()]
    note = f"Not measured: {'; '.join(reasons)}." if reasons else ""
    return Part(title_of(diagnosis), tables, plots, note=note)


def _slopes(kinds: Mapping[str, Any]) -> Figure:
    """Slope of every number, a trace per intervention (its label)."""
    figure, ends = Figure(), list(RANGE)
    for index, (label, measures) in enumerate(kinds.items()):
        found = [(name, each["slope"]) for name, each in summary(measures) if "slope" in each]
        found = [(name, slope) for name, slope in found if slope["value"] is not None]
        if not found:
            continue
        values = [slope["value"] for _, slope in found]
        # Without an interval, the end of the bar is the value.
        low, high = (
            [slope["value"] if slope[end] is None else slope[end] for _, slope in found] for end in ("low", "high")
        )
        ends = [min(ends[0], *low), max(ends[1], *high)]
        color = COLORS[index % len(COLORS)]
        figure.add_trace(
            Scatter(
                # Positions instead of names, so that the kinds stand beside each other.
                x=[NUMBERS.index(name) + 0.18 * (index - (len(kinds) - 1) / 2) for name, _ in found],
                y=values,
                error_y={
                    "array": [end - value for end, value in zip(high, values, strict=True)],
                    "arrayminus": [value - end for end, value in zip(low, values, strict=True)],
                    "thickness": 1.5,
                    "width": 0,
                },
                mode="markers",
                marker={"color": color, "size": 8},
                name=html.escape(label),
                text=[name for name, _ in found],
                hovertemplate="%{text}: %{y:.2f}",
            )
        )
    used = {name for measures in kinds.values() for name, _ in summary(measures) if name in NUMBERS}
    shown = [index for index, name in enumerate(NUMBERS) if name in used]
    style(figure, "", "slope")
    figure.update_xaxes(
        showgrid=False, zeroline=False, tickvals=shown, ticktext=[NUMBERS[index].replace("_", " ") for index in shown]
    )
    figure.update_yaxes(
        showgrid=False, zeroline=False, range=[max(WIDEST[0], ends[0] - 0.05), min(WIDEST[1], ends[1] + 0.05)]
    )
    add_guide(figure, 0, "ignores the geometry", "bottom")
    add_guide(figure, 1, "follows the geometry")
    return figure


def _table(label: str, measures: Mapping[str, Any]) -> ScoreTable:
    columns = ("slope", "correlation", "follows")
    rows = []
    for name, each in summary(measures):
        cells = [measure_cell(each.get(column)) for column in columns]
        rows.append((name.replace("_", " "), [*cells, Cell(str(each["rows"]))]))
    amounts = ", ".join(f"{amount:.3g}" for amount in measures.get("amounts", ()))
    unchanged = measures["unchanged"]
    same = "" if unchanged is None else f"; {100 * unchanged:.0f} % of them unchanged"
    note = f"By {amounts}; {measures['samples']} samples, " if amounts else ""
    note += f"{measures['compared']} of {measures['rows']} answers compared{same}."
    return ScoreTable(label, [*columns, "answers"], rows, note)


def _removed_table(removed: Mapping[str, Any]) -> ScoreTable:
    """Movement without the geometry of one frame, by the number of frames with the target."""
    rows = []
    for which, measures in removed.items():
        for frames, each in {"all": measures, **measures["by_frames"]}.items():
            cells = [
                Cell(str(each["samples"])),
                measure_cell(each["moved"]),
                measure_cell(each["unchanged"], percent=True),
            ]
            rows.append((f"{REMOVED.get(which, which)}, {frames}", cells))
    columns = ["samples", "moved, m", "unchanged, %"]
    note = "By the number of frames that show the target, before the removal."
    return ScoreTable("Geometry of one frame removed", columns, rows, note)


def _replaced_table(replaced: Mapping[str, Any]) -> ScoreTable:
    rows = [
        (REPLACED.get(name, name), [measure_cell(each["unchanged"], percent=True)]) for name, each in replaced.items()
    ]
    counts = ", ".join(sorted({f"{each['samples']} samples" for each in replaced.values()}))
    return ScoreTable("Replaced geometry", ["unchanged answers, %"], rows, f"{counts}.")
