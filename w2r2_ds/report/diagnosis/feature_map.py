"""Feature map: t-SNE of 2D, geometry and fused tokens, and the measures that do not depend on the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from plotly.graph_objects import Figure, Scatter

from w2r2_ds.diagnostics.feature_map import CLOUDS
from w2r2_ds.report.collect import title_of
from w2r2_ds.report.diagnosis.parts import (
    FUSED_COLOR,
    GEOMETRY_COLOR,
    ZERO_COLOR,
    Part,
    Plot,
    number_cell,
    per_layer,
    style,
)
from w2r2_ds.report.scores import ScoreTable

CLOUD_STYLES = {"2d": ("2D", ZERO_COLOR), "3d": ("3D", GEOMETRY_COLOR), "fused": ("fused", FUSED_COLOR)}
"""Cloud -> label and colour."""
MEASURES = {
    "cka": "CKA",
    "centroid_distance": "centroid distance",
    "neighbour_mix": "neighbour mix",
    "expected_mix": "mix of equal clouds",
    "norm_ratio": "norm ratio",
}
"""Measure of two clouds -> label."""
COLORS = {"cka": "#2a78b5", "centroid_distance": "#d9730d", "neighbour_mix": "#35955a", "norm_ratio": "#8a7a00"}
"""Measure -> line colour in the plot over the layers; the mix of equal clouds is the same in every layer."""


def feature_part(diagnosis: Mapping[str, Any]) -> Part:
    """The map, its measures, and the measures of every decoder layer.

    Args:
        diagnosis: content of a file ``features-TASK.json``.
    """
    names = {f"{a}_{b}": f"{CLOUD_STYLES[a][0]} to {CLOUD_STYLES[b][0]}" for a in CLOUDS for b in CLOUDS if a != b}
    rows = [(names[pair], _cells(measures)) for pair, measures in diagnosis["clouds"].items()]
    options = diagnosis["options"]
    note = (
        f"{len(diagnosis['samples'])} tokens; t-SNE with perplexity {options['perplexity']:g}, seed {options['seed']}."
    )
    tables = [ScoreTable("Clouds of tokens", list(MEASURES.values()), rows, note)]
    plots = [Plot("t-SNE of visual tokens", _map(diagnosis["points"]))]
    layers = diagnosis["layers"]
    if layers:
        title = "2D-only and fused pass at the input of every decoder layer"
        lines = {MEASURES[name]: [measures[name] for measures in layers] for name in COLORS}
        plots.append(Plot(title, per_layer(lines, {MEASURES[name]: color for name, color in COLORS.items()})))
        layer_rows = [(f"layer {index}", _cells(measures)) for index, measures in enumerate(layers)]
        tables.append(ScoreTable("Decoder layers", list(MEASURES.values()), layer_rows, ""))
    return Part(title_of(diagnosis), tables, plots)


def _cells(measures: Mapping[str, float | None]) -> list[Any]:
    return [number_cell(measures[name]) for name in MEASURES]


def _map(points: Mapping[str, Any]) -> Figure:
    """All clouds in one plot; the axes of a t-SNE have no unit, so they are not drawn."""
    figure = Figure()
    for cloud in CLOUDS:
        label, color = CLOUD_STYLES[cloud]
        x, y = np.asarray(points[cloud], dtype=np.float32).reshape(-1, 2).T
        marker = {"color": color, "size": 5, "opacity": 0.75}
        figure.add_trace(Scatter(x=x, y=y, mode="markers", marker=marker, name=label, hoverinfo="name"))
    style(figure, "", "")
    figure.update_layout(height=360, margin={"l": 8, "r": 8, "b": 8})
    # No axes: those of a t-SNE have no meaning. Equal scales, so that clusters keep their shape.
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return figure
