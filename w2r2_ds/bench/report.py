"""Report of a benchmark: table, criteria with their limits, notes and machine; printed or saved as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.versions import processor_name, versions


@dataclass(frozen=True)
class Criterion:
    """A measured value with a limit.

    Attributes:
        claim: description of the value.
        measured: the value.
        limit: the maximum that it should have.
    """

    claim: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return bool(self.measured <= self.limit)


@dataclass
class BenchReport:
    """Result of one benchmark.

    Attributes:
        name: name of the benchmark.
        title: one line: quantity, unit and conditions.
        rows: table rows, column -> value; the first column is the name of the row.
        criteria: values with limits.
        notes: sentences that explain the numbers.
        machine: processor, GPU and versions.
    """

    name: str
    title: str
    rows: list[dict[str, Any]]
    criteria: list[Criterion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())

    @property
    def failed(self) -> bool:
        """False: criteria of a single benchmark are reported, but do not make the command fail."""
        return False

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, with unrounded numbers."""
        criteria = [asdict(each) | {"met": each.met} for each in self.criteria]
        head = {"name": self.name, "title": self.title, "machine": self.machine}
        return head | {"rows": self.rows, "criteria": criteria, "notes": self.notes}

    def save(self, path: Path) -> None:
        """Write the report as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.replace(path, json.dumps(self.to_json(), indent=2) + "\n")

    def show(self, console: Console | None = None, with_machine: bool = True) -> None:
        """Print the table, the criteria, the notes and the machine."""
        console = console or Console(highlight=False, width=None if os.isatty(1) else 150)
        table = Table(title=f"{self.name}: {self.title}", title_justify="left")
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(cell(row.get(column)) for column in columns))
        console.print(table)
        for each in self.criteria:
            result = "met" if each.met else "NOT MET"
            console.print(f"{each.claim}: {each.measured:.3g}, at most {each.limit:g}: {result}", markup=False)
        for note in self.notes:
            console.print(f"- {note}", markup=False)
        if with_machine:
            console.print("; ".join(f"{key} {value}" for key, value in self.machine.items()), markup=False)


def cell(value: Any) -> str:
    """Format a table value: numbers with three or four significant digits, None as an empty cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def describe_machine() -> dict[str, Any]:
    """Processor, load, memory, GPU and package versions."""
    found: dict[str, Any] = {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found | versions()
