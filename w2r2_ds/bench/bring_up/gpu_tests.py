"""Run the tests that need a GPU (``pytest -m gpu``), in a process of their own."""

from __future__ import annotations

import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import w2r2_ds
from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.ranks import run_process
from w2r2_ds.bench.report import BenchReport, Criterion

MARK = "mark.gpu"
OUTCOMES = ("passed", "skipped", "failed")


def run(settings: Settings) -> BenchReport:
    """Outcomes of the GPU tests by file; without a GPU they are collected and skipped.

    Raises:
        ValueError: this is an installed package, which has no tests.
        RuntimeError: pytest could not run the tests, or was still running at the deadline.
    """
    folder = Path(w2r2_ds.__file__).resolve().parent.parent / "tests"
    if not folder.is_dir():
        raise ValueError("the tests are not part of the installed package; run this part in a checkout.")
    report = BenchReport("gpu_tests", "outcomes of pytest -m gpu", [])
    # Only files with such tests: collecting all others would import them.
    files = sorted(str(file) for file in folder.rglob("test_*.py") if MARK in file.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={result}"]
        done = run_process([*command, *files], settings.remaining(), cwd=folder.parent)
        if not result.is_file():
            raise RuntimeError(f"pytest: {(done.stderr or done.stdout)[-1000:]}")
        cases = list(ElementTree.parse(result).iter("testcase"))
    by_file: dict[str, Counter[str]] = {}
    for case in cases:
        by_file.setdefault(case.get("classname", ""), Counter())[outcome(case)] += 1
        report.notes += [f"{case.get('name')}: {each.get('message')}" for each in failures(case)]
    report.rows = [{"file": file} | {name: counts[name] for name in OUTCOMES} for file, counts in by_file.items()]
    failed = sum(counts["failed"] for counts in by_file.values())
    report.criteria.append(Criterion("number of failed GPU tests", failed, 0))
    if settings.device.type == "cpu":
        report.notes.append("Skipped: there is no GPU.")
    return report


def outcome(case: ElementTree.Element) -> str:
    """Outcome of a test case of a JUnit file, one of `OUTCOMES`."""
    if failures(case):
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def failures(case: ElementTree.Element) -> list[ElementTree.Element]:
    """Failures of a test case, including errors of its fixtures."""
    return [*case.findall("failure"), *case.findall("error")]
