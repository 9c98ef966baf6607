"""What a section of a diagnosis consists of: tables, plots and pictures of one file; and helpers to build them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.graph_objects import Figure, Scatter

from w2r2_ds.report.curves import COLORS
from w2r2_ds.report.room import BOX_STYLES
from w2r2_ds.report.scores import Cell, ScoreTable

FUSED_COLOR, ZERO_COLOR, GEOMETRY_COLOR = BOX_STYLES["fused"][0], BOX_STYLES["zero"][0], COLORS[0]
"""Colours of 2D + 3D, of 2D only (those of their boxes), and of geometry alone."""
GUIDE_COLOR = "#8a9199"
"""Colour of reference lines and of the text at them; readable on a light and a dark background."""
HEIGHT = 300
"""Height of a plot, pixels."""
FEW_LAYERS = 12
"""Largest number of layers that all have a tick."""


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        title: its caption.
        figure: the figure.
    """

    title: str
    figure: Figure


@dataclass(frozen=True)
class HeatMap:
    """A picture of the attention of one sample.

    Attributes:
        caption: sample and anchors.
        uri: JPEG as a data URI.
        width: pixels.
        height: pixels.
    """

    caption: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Part:
    """One file's share of a section.

    Attributes:
        title: task and data.
        tables: tables.
        plots: plots.
        pictures: heat maps.
        note: counts, and what could not be measured.
        problem: why there are no pictures; empty if there are.
    """

    title: str
    tables: Sequence[ScoreTable] = ()
    plots: Sequence[Plot] = ()
    pictures: Sequence[HeatMap] = ()
    note: str = ""
    problem: str = ""


def number_cell(value: float | None, digits: int = 2) -> Cell:
    """A number as text; an empty cell if it is not defined."""
    return Cell("" if value is None else f"{value:.{digits}f}")


def measure_cell(estimate: Mapping[str, Any] | None, percent: bool = False) -> Cell:
    """An estimate (``value``, ``low``, ``high``) with its interval; an empty cell if it is not defined.

    Args:
        estimate: the estimate; None for a measure that the row does not have.
        percent: write it times 100, with one decimal instead of two.
    """
    if estimate is None or estimate["value"] is None:
        return Cell("")
    factor, digits = (100, 1) if percent else (1, 2)
    interval = ""
    if estimate["low"] is not None:
        interval = f"[{factor * estimate['low']:.{digits}f}, {factor * estimate['high']:.{digits}f}]"
    return Cell(f"{factor * estimate['value']:.{digits}f}", interval)


def style(figure: Figure, x: str, y: str) -> Figure:
    """Set the axis titles, the margins and a legend above the plot; returns the figure."""
    figure.update_layout(
        height=HEIGHT,
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}},
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
    )
    return figure


def per_layer(values: Mapping[str, Sequence[float | None]], colors: Mapping[str, str], y: str = "") -> Figure:
    """A line per measure over the decoder layers.

    Args:
        values: label -> value of every layer.
        colors: label -> colour of its line.
        y: title of the vertical axis.
    """
    figure = Figure()
    for label, measured in values.items():
        line = {"color": colors[label], "width": 2}
        layers = list(range(len(measured)))
        figure.add_trace(Scatter(x=layers, y=list(measured), mode="lines+markers", line=line, name=label))
    style(figure, "decoder layer", y)
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(tickformat="d", dtick=1 if len(layers) <= FEW_LAYERS else None)
    figure.update_yaxes(rangemode="tozero")
    return figure


def add_guide(figure: Figure, y: float, text: str, side: str = "top") -> None:
    """Add a dashed horizontal line at `y`, with a text at its right end, above (``top``) or below it (``bottom``)."""
    figure.add_hline(
        y=y,
        line={"color": GUIDE_COLOR, "width": 1, "dash": "dash"},
        layer="below",
        annotation={"text": text, "font": {"color": GUIDE_COLOR}},
        annotation_position=f"{side} right",
    )
