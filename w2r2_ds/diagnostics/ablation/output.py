"""Output of an ablation: results.json, a table in the terminal, and plots.html."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from w2r2_ds.diagnostics.ablation.comparison import Row
from w2r2_ds.diagnostics.ablation.plan import Plan
from w2r2_ds.diagnostics.ablation.statistics import NONE, Comparison
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.packages import import_problem

logger = logging.getLogger(__name__)

RESULTS, PLOTS = "results.json", "plots.html"
COLOR, SEED_COLOR = "#2a78b5", "#8a8f95"
"""Colours of the plots: means and differences; single seeds."""
SIGNIFICANT = 0.05
"""Adjusted p below which a difference is printed in bold."""


def write_results(plan: Plan, rows: Sequence[Row], failures: Sequence[str], level: float) -> Path:
    """Write results.json; returns its path."""
    content = {
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "level": level,
        "comparisons": sum(row.p_holm is not None for row in rows),
        "unfinished": [run.name for run in plan.runs if not plan.is_finished(run)],
        "failures": list(failures),
        "arms": [
            {
                "name": arm.name,
                "options": dict(arm.options),
                "metrics": {row.metric: row.as_json() for row in rows if row.arm == arm.name},
            }
            for arm in plan.arms
        ],
    }
    file = plan.out / RESULTS
    atomic_io.replace(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return file


def tables(rows: Sequence[Row], baseline: str, level: float) -> list[Table]:
    """One table per metric."""
    return [_table(metric, [row for row in rows if row.metric == metric], baseline, level) for metric in _metrics(rows)]


def print_results(rows: Sequence[Row], baseline: str, level: float) -> None:
    """Print one table per metric to standard output."""
    console = Console(width=None if Console().is_terminal else 120)
    for table in tables(rows, baseline, level):
        console.print(table)
    methods = sorted({row.difference.method for row in rows if row.difference is not None} - {NONE})
    note = f"all values times 100; {100 * level:.0f} % intervals: {', '.join(methods)}" if methods else ""
    console.print(note or "all values times 100", markup=False, highlight=False)
    if any(row.p_holm is not None for row in rows):
        console.print("p is corrected for all comparisons of these tables (Holm)", markup=False, highlight=False)
    if any(row.difference is not None and row.p_holm is None for row in rows):
        console.print(
            "no p: a test needs two seeds of both arms, with different differences", markup=False, highlight=False
        )


def _table(metric: str, rows: Sequence[Row], baseline: str, level: float) -> Table:
    table = Table(title=metric, title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in ("seeds", "mean ± sd", f"difference [{100 * level:.0f} %]", "p (Holm)"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = "" if row.deviation is None else f" ± {100 * row.deviation:.1f}"
        difference, p = ("baseline", "") if row.arm == baseline else ("", "")
        if row.difference is not None:
            difference = f"{100 * row.difference.mean:+.1f}{_interval(row.difference)}"
            p = "" if row.p_holm is None else f"{row.p_holm:.4f}"
        style = "bold" if row.p_holm is not None and row.p_holm < SIGNIFICANT else None
        cells = (row.arm, str(len(row.by_seed)), f"{100 * row.mean:.1f}{spread}", difference, p)
        table.add_row(*map(_plain, cells), style=style)
    return table


def _interval(found: Comparison) -> str:
    return "" if found.low is None or found.high is None else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _plain(text: str) -> str:
    """Text whose square brackets rich does not read as markup."""
    return text.replace("[", r"\[")


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.metric for row in rows))


def write_plots(plan: Plan, rows: Sequence[Row], level: float) -> Path | None:
    """Write plots.html: per metric, values of all seeds and differences to the baseline; returns its path.

    None, with a warning, if plotly is not installed.
    """
    if problem := import_problem("plotly"):
        logger.warning("no plots: plotly %s; pip install 'w2r2-ds[report]'", problem)
        return None
    file = plan.out / PLOTS
    numbers = {arm.name: _number(arm.options) for arm in plan.arms}
    atomic_io.replace(file, _page(rows, plan.baseline, numbers, level))
    return file


def _number(options: Mapping[str, Any]) -> float | None:
    """Value of the only option of an arm, if it is a number: its place on a numeric axis."""
    values = list(options.values())
    numeric = len(values) == 1 and isinstance(values[0], int | float) and not isinstance(values[0], bool)
    return float(values[0]) if numeric else None


def _page(rows: Sequence[Row], baseline: str, numbers: Mapping[str, float | None], level: float) -> str:
    import html

    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    metrics = _metrics(rows)
    titles = [
        title for metric in metrics for title in (html.escape(metric), f"difference, {100 * level:.0f} % interval")
    ]
    figure = make_subplots(
        rows=max(1, len(metrics)), cols=2, subplot_titles=titles, vertical_spacing=0.3 / max(2, len(metrics))
    )
    # A sweep of one number is a curve; any other arms are categories.
    curve = all(number is not None for number in numbers.values())
    ink = {"marker": {"color": COLOR, "size": 8}, "line": {"color": COLOR}}
    for index, metric in enumerate(metrics, start=1):
        shown = [row for row in rows if row.metric == metric]
        places = [numbers[row.arm] if curve else html.escape(row.arm) for row in shown]
        errors = [100 * (row.deviation or 0.0) for row in shown]
        means = [100 * row.mean for row in shown]
        error_y = {"type": "data", "array": errors}
        mode = "lines+markers" if curve else "markers"
        figure.add_trace(Scatter(x=places, y=means, error_y=error_y, mode=mode, name="mean ± sd", **ink), index, 1)
        seeds = [
            (place, seed, value)
            for place, row in zip(places, shown, strict=True)
            for seed, value in row.by_seed.items()
        ]
        figure.add_trace(
            Scatter(
                x=[place for place, _, _ in seeds],
                y=[100 * value for _, _, value in seeds],
                text=[f"seed {seed}" for _, seed, _ in seeds],
                mode="markers",
                marker={"symbol": "circle-open", "size": 6, "color": SEED_COLOR},
                name="seeds",
            ),
            index,
            1,
        )
        compared = [(place, row.difference) for place, row in zip(places, shown, strict=True) if row.difference]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [0.0 if found.high is None else 100 * (found.high - found.mean) for _, found in compared],
            "arrayminus": [0.0 if found.low is None else 100 * (found.mean - found.low) for _, found in compared],
        }
        means = [100 * found.mean for _, found in compared]
        trace = Scatter(
            x=[place for place, _ in compared], y=means, error_y=bars, mode="markers", name="difference", **ink
        )
        figure.add_trace(trace, index, 2)
        figure.add_hline(y=0, line={"dash": "dot", "width": 1}, row=index, col=2)
    title = f"Differences to {html.escape(baseline)}; all values times 100"
    figure.update_layout(
        template="plotly_white", title=title, height=120 + 380 * max(1, len(metrics)), showlegend=False
    )
    return str(figure.to_html(include_plotlyjs=True, config={"displaylogo": False, "responsive": True}))
