"""Tables of the demo's scores for README.md, docs/get-started/first-run.md and docs/research/demo-pair.md.

``python docs/scripts/demo_table.py runs/demo`` writes docs/measured/demo.json from a finished demo and prints the
tables of both files; runs/demo_vggt (``--demo.geometry vggt``) becomes docs/measured/demo_vggt.json. Without an
argument, it prints the tables only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.bench.report import describe_machine
from w2r2_ds.demo.results_table import METRICS
from w2r2_ds.diagnostics.table1 import OVERALL

MEASURED = Path(__file__).parents[1] / "measured"
FILE, VGGT_FILE = MEASURED / "demo.json", MEASURED / "demo_vggt.json"
NAMES = {"scanrefer": "ScanRefer", "scan2cap": "Scan2Cap", "scanqa": "ScanQA"}


def collect(demo: Path) -> dict[str, Any]:
    """Scores of the demo in a folder: per task, the cells of the main metric and the measures of causality."""
    tasks = {}
    for task, (metric, _) in METRICS.items():
        result = json.loads((demo / "evaluation" / f"diagnosis-{task}.json").read_text())
        cells = result["table1"]["cells"]
        own = [cell for cell in cells if cell["metric"] == metric and cell["group"] == OVERALL]
        labels = {row["row"]: row["label"].partition(",")[0] for row in result["table1"]["rows"]}
        tasks[task] = {
            "metric": metric,
            "samples": result["samples"],
            "scenes": result["scenes"],
            "rows": [
                {"answers": labels[cell["row"]]} | {name: cell[name] for name in ("value", "low", "high")}
                for cell in own
                if cell["protocol"] == cells[0]["protocol"]
            ],
            "causality": result.get("causality", {}).get("interventions", {}),
        }
    return {"machine": describe_machine(), "tasks": tasks}


def table(tasks: Mapping[str, Any]) -> str:
    """Markdown: a row per task, a column per set of answers; scores times 100 with 95 % intervals over rooms."""
    columns = list(dict.fromkeys(row["answers"] for result in tasks.values() for row in result["rows"]))
    lines: list[Sequence[str]] = [["", *columns], ["---"] * (len(columns) + 1)]
    for task, result in tasks.items():
        name = f"{NAMES[task]}, {result['metric']} ({result['samples']} samples, {result['scenes']} rooms)"
        cells = {row["answers"]: _cell(row) for row in result["rows"]}
        lines.append([name, *(cells.get(column, "") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * row[name]:.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        (MEASURED / f"{folder.name}.json").write_text(json.dumps(collect(folder), indent=1) + "\n")
    for file in (FILE, VGGT_FILE):
        print(f"{file.stem}\n{table(json.loads(file.read_text())['tasks'])}\n")
