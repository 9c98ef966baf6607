"""Consistency of docs and code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs_scripts import DOCS, docs_script
from w2r2_ds.models.fusion import FUSIONS
from w2r2_ds.objective.loss import STATS
from w2r2_ds.objective.push_terms import PUSH_TERMS


@pytest.fixture(scope="module")
def figures() -> Any:
    return docs_script("figures")


def test_the_objective_page_lists_every_push_term_statistic_and_fusion() -> None:
    text = (DOCS / "concepts" / "objective.md").read_text()
    for name in (*PUSH_TERMS, *FUSIONS, *STATS):
        assert f"`{name}`" in text, name


def test_every_figure_can_be_drawn_and_is_used(figures: Any, tmp_path: Path) -> None:
    """Every push term except `none` has a figure, and docs/figures/ holds the output of the script."""
    drawn = {file.name for file in figures.draw(tmp_path)}
    assert drawn == {f"push_{name}.svg" for name in PUSH_TERMS if name != "none"}
    assert {file.name for file in (DOCS / "figures").glob("push_*.svg")} == drawn
    for file in (DOCS / "figures").glob("push_*.svg"):
        if f"Matplotlib v{figures.matplotlib.__version__}" in file.read_text():  # another version draws other bytes
            assert file.read_bytes() == (tmp_path / file.name).read_bytes(), f"{file.name}: run docs/scripts/figures.py"
    shown = set(re.findall(r"figures/(push_\w+\.svg)", (DOCS / "concepts" / "objective.md").read_text()))
    assert shown == drawn


def test_curves_are_finite_and_not_constant(figures: Any) -> None:
    for name, (curves, _, _) in figures.PICTURES.items():
        for _, x, y in curves():
            assert x.isfinite().all() and y.isfinite().all() and y.max() > y.min(), name


def test_every_quoted_heading_of_troubleshooting_is_a_message_of_the_code() -> None:
    """Parts of a heading between names and numbers occur in the package, the batch scripts, or a library's message."""
    code = "".join(
        re.sub(r"\"\s+f?\"", "", file.read_text())
        for folder in ("w2r2_ds", "slurm")
        for file in (DOCS.parent / folder).rglob("*")
        if file.suffix in (".py", ".sh", ".sbatch")
    )
    headings = re.findall(r"^### (.*)", (DOCS / "guides/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for heading in headings for text in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 15
    absent = {
        part
        for text in quoted
        for part in re.split(r"\.\.\.|--data\.root|\bRECIPE\.yaml|\bstep-|\bNODE|\b[\w.-]*\d[\w.-]*\b", text)
        if len(part.strip()) > 4 and part.strip() not in code
    }
    assert absent <= {"CUDA out of memory", "Timeout (", "Node failure on "}  # PyTorch's, faulthandler's and Slurm's


def test_the_table_of_the_demo_is_that_of_its_results() -> None:
    """README.md and two pages have the output of docs/scripts/demo_table.py."""
    script = docs_script("demo_table")
    pages = {
        script.FILE: (DOCS.parent / "README.md", DOCS / "get-started" / "first-run.md"),
        script.VGGT_FILE: (DOCS / "research" / "demo-pair.md",),
    }
    for file, found in pages.items():
        table = script.table(json.loads(file.read_text())["tasks"])
        assert len(table.splitlines()) == 5 and "acc@0.25" in table
        for page in found:
            assert table in page.read_text(), f"{page.name}: insert the output of docs/scripts/demo_table.py"
