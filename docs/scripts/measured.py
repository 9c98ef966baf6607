"""Print the tables of docs/research/measurements.md from docs/measured/: ``python docs/scripts/measured.py``.

``python launchers/bench.py NAME --json docs/measured/NAME.json`` writes a file there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from w2r2_ds.bench.report import cell
from w2r2_ds.commands.bench import BENCHMARKS

FOLDER = Path(__file__).parents[1] / "measured"
HIDDEN = {"q1", "q3", "runs", "shape", "operations"}
"""Keys of a row that are not columns: part of another cell, or the same in every row."""
MACHINE = ("load", "threads", "processor", "gpu", "torch", "transformers", "peft", "deepspeed", "triton", "python")


def read() -> list[dict[str, Any]]:
    """All saved reports, in the order of the benchmarks; that of `bring_up` contains one per part."""
    paths = [FOLDER / f"{name}.json" for name in BENCHMARKS]
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [each for report in reports for each in (report, *report.get("parts", {}).values())]


def section(report: dict[str, Any]) -> str:
    """Markdown section of a report."""
    machine = report["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in MACHINE if machine.get(name))
    setting = f"{machine['processors']} processors, {machine['memory_gib']:.0f} GiB; {facts}."
    claims = [
        f"* {each['claim']}: **{each['measured']:.3g}**, at most {each['limit']:g}: "
        f"{'met' if each['met'] else '**not met**'}."
        for each in report["criteria"]
    ]
    notes = [f"* {note}" for note in report["notes"]]
    parts = [f"### `{report['name']}`", f"{report['title'][:1].upper()}{report['title'][1:]}. {setting}", table(report)]
    return "\n\n".join([*parts, *(["\n".join(claims + notes)] if claims + notes else [])])


def table(report: dict[str, Any]) -> str:
    """Markdown table of the rows, with quartiles after the median."""
    rows = [cells_of(row) for row in report["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells_of(row: dict[str, Any]) -> dict[str, str]:
    """Column -> text of a row's cells."""
    cells = {key: cell(value) for key, value in row.items() if key not in HIDDEN}
    if "q1" in row:
        cells["seconds"] += f" ({cell(row['q1'])} .. {cell(row['q3'])})"
    return cells


if __name__ == "__main__":
    print("\n\n".join(section(report) for report in read()))
