"""Create the fault matrix of the docs: ``python tests/faults/matrix.py [TEST ...] [--into FILE]``.

Runs tests/faults and tests/cluster with their nightly tests (or the given tests) and prints a Markdown table with one
row per fault. The numbers are properties in pytest's JUnit report (`scenario.record_rows`). A failed test is a row too.

FILE is docs/guides/troubleshooting.md; the table replaces the text between its two marks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEAD = "| Fault | Injections | Restarts | Bit-equal to a run without faults | All ranks ended within |"
BEGIN, END = "<!-- fault matrix: begin -->", "<!-- fault matrix: end -->"


def main(args: Sequence[str]) -> int:
    """Run the tests and print the table, with --into also into a document; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=["tests/faults", "tests/cluster"], help="arguments of pytest")
    parser.add_argument("--into", type=Path, help=f"document with the lines {BEGIN} and {END}")
    parser.add_argument("--report", type=Path, nargs="+", help="reports of pytest --junitxml, instead of a run")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        reports = options.report or [Path(folder) / "report.xml"]
        if options.report is None:
            selection = ["-m", "nightly or not nightly", "-o", "junit_family=xunit1", f"--junitxml={reports[0]}"]
            subprocess.run([sys.executable, "-m", "pytest", "-q", *selection, *options.tests], cwd=ROOT, check=False)
        cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
        text = table(cases, max(report.stat().st_mtime for report in reports))
    print(text)
    if options.into is not None:
        put(text, options.into)
    return int(any(failed(case) for case in cases))


def failed(case: ElementTree.Element) -> bool:
    """Whether a test failed."""
    return case.find("failure") is not None or case.find("error") is not None


def rows(cases: Sequence[ElementTree.Element]) -> Iterator[dict[str, Any]]:
    """Rows that the tests recorded (`scenario.record_rows`), and one row per failed test."""
    for case in cases:
        for each in case.iter("property"):
            if each.get("name") == "fault":
                yield json.loads(str(each.get("value")))
        if failed(case):
            name = f"FAILED: {case.get('name')}"
            yield {"fault": name, "injected": 0, "restarts": 0, "equal": False, "ended": []}


def table(cases: Sequence[ElementTree.Element], when: float) -> str:
    """The Markdown table: one row per fault, counts summed over the tests."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows(cases):
        into = sums.setdefault(row["fault"], {"injected": 0, "restarts": 0, "equal": True, "ended": []})
        into["injected"] += row["injected"]
        into["restarts"] += row["restarts"]
        into["equal"] &= row["equal"]
        into["ended"] += row["ended"]
    lines = [HEAD, "|---|---:|---:|---|---:|"]
    for fault, row in sums.items():
        ended = f"{max(row['ended']):.1f} s" if row["ended"] else "-" if row["restarts"] else "continues"
        equal = "yes" if row["equal"] else "NO"
        lines.append(f"| {fault} | {row['injected']} | {row['restarts']} | {equal} | {ended} |")
    skipped = [case for case in cases if case.find("skipped") is not None]
    seconds = sum(float(case.get("time", 0)) for case in cases)
    day = time.strftime("%Y-%m-%d", time.gmtime(when))
    about = f"{len(cases)} tests in {seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores, {day}"
    lines += ["", about + (f"; {len(skipped)} skipped." if skipped else ".")]
    return "\n".join(lines)


def put(text: str, document: Path) -> None:
    """Replace the text between the two marks of a document.

    Raises:
        ValueError: the document has no marks.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {BEGIN} and {END}; put them where the table belongs.")
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
