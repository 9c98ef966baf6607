"""Curves of a report: the metrics of one or several runs over the optimizer steps, as plotly figures."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from plotly.graph_objects import Figure, Scatter

from w2r2_ds.report.collect import RunData

SECTIONS = {
    "Loss": ("loss", "align", "push", "push_active", "unpaired"),
    "Similarity s of the answers to their labels": ("s_short", "s_fused", "s_gain", "above_mu", "det"),
    "Answers without a valid box": ("invalid_short", "invalid_fused"),
    "Norms": ("grad_norm", "grad_norm_lora", "grad_norm_geometry", "geometry_norm"),
    "Throughput": ("samples_per_s", "tokens_per_s", "step_s", "data_s", "memory_gib"),
}
"""Title of a section -> its metrics."""
COLORS = ("#2a78b5", "#d9730d", "#35955a", "#b5439b", "#8a7a00", "#6a5acd")
"""Line colours of the runs, readable on a light and a dark background."""
HEIGHT = 190
"""Height of a curve, pixels."""
FEW = 8
"""Largest number of points that are drawn as points."""
MAX_POINTS = 1000
"""Most points of a curve: 40 metrics of 20,000 steps each would not fit into a page."""


def curves(runs: Sequence[RunData]) -> dict[str, dict[str, Figure]]:
    """Title of a section -> metric -> figure, of all metrics that a run has."""
    known = sorted({name for run in runs for _, values in run.metrics for name in values if name != "step"})
    sections = {title: [name for name in names if name in known] for title, names in SECTIONS.items()}
    sections["Decode gap"] = [name for name in known if "gap" in name]
    sections["Validation"] = [name for name in known if "/" in name and "gap" not in name]
    shown = {name for names in sections.values() for name in names}
    sections["Other"] = [name for name in known if name not in shown]
    return {title: {name: curve(runs, name) for name in names} for title, names in sections.items() if names}


def curve(runs: Sequence[RunData], name: str) -> Figure:
    """One metric over the steps, with a line per run."""
    figure = Figure()
    for number, run in enumerate(runs):
        points = thinned([(step, values[name]) for step, values in run.metrics if name in values])
        # A metric that is measured rarely, such as validation, is a few points.
        mode = "lines" if len(points) > FEW else "lines+markers"
        line = {"color": COLORS[number % len(COLORS)], "width": 1.5}
        steps, values = [step for step, _ in points], [value for _, value in points]
        figure.add_trace(Scatter(x=steps, y=values, name=html.escape(run.name), mode=mode, line=line))
    margin = {"l": 48, "r": 10, "t": 8, "b": 28}
    figure.update_layout(height=HEIGHT, margin=margin, showlegend=False, hovermode="x unified")
    return figure


def thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[float, float]]:
    """At most `MAX_POINTS` points: means of step and value over equal numbers of consecutive points."""
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // MAX_POINTS)
    starts = np.arange(0, len(points), size)
    counts = np.diff([*starts, len(points)])
    means = np.add.reduceat(np.asarray(points, dtype=np.float64), starts) / counts[:, None]
    return [(step, value) for step, value in means.tolist()]
