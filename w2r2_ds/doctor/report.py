"""Print the doctor's report: tables of versions, settings and checks, then errors and warnings with their nodes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from w2r2_ds.doctor.result import CheckResult, RankReport
from w2r2_ds.utils.sanitize import message, one_line, without_secrets

WIDTH = 120
"""Width of a table in a log file, in characters."""
INSTALLED = ("versions", "code")
"""Checks whose `info` is about installed packages and code; that of all other checks is about settings and hardware."""


@dataclass(frozen=True)
class Finding:
    """An error or a warning of a node; the text has a cause and a remedy."""

    error: bool
    host: str
    text: str


def findings(reports: list[RankReport]) -> list[Finding]:
    """Errors, then warnings, from all checks and from the comparison of the nodes, without duplicates."""
    results = [(report.host, result) for report in reports for result in report.results.values()]
    found = [Finding(True, host, text) for host, result in results for text in result.errors]
    found += [Finding(True, host, text) for host, text in differences(reports, "must_match")]
    found += [Finding(False, host, text) for host, text in differences(reports, "should_match")]
    found += [Finding(False, host, text) for host, result in results for text in result.warnings]
    return list(dict.fromkeys(found))


def differences(reports: list[RankReport], field: str) -> list[tuple[str, str]]:
    """Compare the nodes: host and message for every value of `CheckResult.<field>` that differs from rank 0's node."""
    first, *others = [report for report in reports if report.local_rank == 0] or reports
    found = []
    for report in others:
        for check in report.results.keys() & first.results.keys():
            own, expected = getattr(report.results[check], field), getattr(first.results[check], field)
            texts = [
                f"{name} is {own[name]} here, but {expected[name]} on {first.host}; make the nodes the same."
                for name in expected
                if name in own and own[name] != expected[name]
            ]
            if check == "versions":
                texts += [f"{name} is missing here; {first.host} has it: install it." for name in expected.keys() - own]
                texts += [f"{name} is installed here, but not on {first.host}." for name in own.keys() - expected]
            found += [(report.host, text) for text in texts]
    return found


def show(reports: list[RankReport], found: list[Finding]) -> None:
    """Print tables and findings to standard output; the first report is that of rank 0."""
    first = reports[0].results
    settings = [(name, value) for check in first if check not in INSTALLED for name, value in first[check].info.items()]
    installed = [row for check in INSTALLED for row in first.get(check, CheckResult()).info.items()]
    _table(f"installed on {reports[0].host}", ("name", "version or path"), installed)
    _table(f"settings and hardware of {reports[0].host}", ("name", "value"), settings)
    _table("checks", ("check", "result"), summary_rows(reports))
    hosts: dict[tuple[bool, str], list[str]] = {}  # one line per finding, with all nodes that have it
    for finding in found:
        hosts.setdefault((finding.error, finding.text), []).append(finding.host)
    for (error, text), names in hosts.items():
        print(message(f"{'ERROR' if error else 'warning'}: {', '.join(names)}: {text}"))
    errors = [finding for finding in found if finding.error]
    on_nodes = f", on {', '.join(sorted({finding.host for finding in errors}))}" if errors else ""
    count = {0: "no errors", 1: "1 error"}.get(len(errors), f"{len(errors)} errors")
    print(message(f"doctor: {count}{on_nodes}."), flush=True)


def summary_rows(reports: list[RankReport]) -> list[tuple[str, str]]:
    """Table rows: name of a check, and the number of nodes that passed it, or the nodes with errors or warnings."""
    rows = []
    for check in dict.fromkeys(name for report in reports for name in report.results):
        done = [(report.host, report.results[check]) for report in reports if check in report.results]
        errors = sorted({host for host, result in done if result.errors})
        warnings = sorted({host for host, result in done if result.warnings})
        hosts = {host for host, _ in done}
        if errors:
            rows.append((check, f"ERROR on {', '.join(errors)}"))
        elif warnings:
            rows.append((check, f"warning on {', '.join(warnings)}"))
        else:
            rows.append((check, "ok" if len(hosts) == 1 else f"ok on {len(hosts)} nodes"))
    return rows


def _table(title: str, header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    table = Table(title=one_line(title), title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for name, value in rows:
        style = "red" if value.startswith(("ERROR", "missing")) else ""
        # Text, not str: names and values come from files and the environment, and may contain rich's markup.
        table.add_row(Text(one_line(name)), Text(one_line(without_secrets(value)), style=style))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH).print(table)
