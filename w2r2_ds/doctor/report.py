"""What the doctor found, as a table where rich is there and as plain lines where it is not."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from w2r2_ds.doctor.result import Report
from w2r2_ds.utils.sanitize import message, one_line, without_secrets

WIDTH = 120
"""Of a table in a log, which has no width of its own."""
INSTALLED = ("versions", "code")
"""Checks whose rows say what is installed; the rows of others say what will be used."""


@dataclass(frozen=True)
class Sentence:
    """One thing that is wrong, or may be.

    Args:
        wrong: or only a warning.
        host: node, empty for the launch as a whole.
        text: what, and what to do.
    """

    wrong: bool
    host: str
    text: str


def sentences(reports: list[Report]) -> list[Sentence]:
    """All of the ranks' reports: what is wrong first, each once per node."""
    found = [Sentence(True, r.host, text) for r in reports for o in r.outcomes.values() for text in o.wrong]
    found += [Sentence(False, r.host, text) for r in reports for o in r.outcomes.values() for text in o.warnings]
    return list(dict.fromkeys(found))


def show(reports: list[Report], found: list[Sentence], verdict: str) -> None:
    """Print everything; `reports` are those of ranks that came, rank 0 first."""
    first = reports[0]
    installed = [(name, value) for check in INSTALLED for name, value in _shown(first, check)]
    used = [(name, value) for check in first.outcomes if check not in INSTALLED for name, value in _shown(first, check)]
    _table(f"installed on {first.host}", ("what", "version or place"), installed)
    _table("will be used", ("what", "how"), used)
    _table("checks", ("check", "result"), results(reports))
    for sentence in merged(found):
        print(sentence)
    print(message(verdict), flush=True)


def results(reports: list[Report]) -> list[tuple[str, str]]:
    """Every check that was done: fine on how many nodes, or where it is wrong."""
    rows = []
    for check in dict.fromkeys(name for report in reports for name in report.outcomes):
        done = [(report.host, report.outcomes[check]) for report in reports if check in report.outcomes]
        bad = sorted({host for host, outcome in done if outcome.wrong})
        doubtful = sorted({host for host, outcome in done if outcome.warnings})
        if bad:
            rows.append((check, f"WRONG on {', '.join(bad)}"))
        elif doubtful:
            rows.append((check, f"warning on {', '.join(doubtful)}"))
        else:
            hosts = {host for host, _ in done}
            rows.append((check, "fine" if len(hosts) == 1 else f"fine on {len(hosts)} nodes"))
        if check == "clock":  # rank 0's node has none to show among its own rows
            rows += [(f"  {host}", value) for host, outcome in done for value in outcome.shown.values()]
    return rows


def merged(found: list[Sentence]) -> list[str]:
    """Lines of text, fit for a terminal; nodes of which the same is true share one."""
    hosts: dict[tuple[bool, str], list[str]] = {}
    for sentence in sorted(found, key=lambda each: not each.wrong):
        hosts.setdefault((sentence.wrong, sentence.text), []).append(sentence.host)
    lines = []
    for (wrong, text), where in hosts.items():
        names = ", ".join(name for name in where if name)
        lines.append(message(f"{'WRONG' if wrong else 'warning'}: {names + ': ' if names else ''}{text}"))
    return lines


def _shown(report: Report, check: str) -> list[tuple[str, str]]:
    return list(report.outcomes[check].shown.items()) if check in report.outcomes else []


def _table(title: str, header: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    title = one_line(title)
    rows = [(one_line(name), one_line(without_secrets(value))) for name, value in rows]  # of files and the environment
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        width = max((len(name) for name, _ in rows), default=0)
        print("\n".join([f"== {title}", *(f"   {name:<{width}}  {value}" for name, value in rows)]))
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for name, value in rows:
        style = "red" if value.startswith(("WRONG", "missing")) else ""
        table.add_row(Text(name), Text(value, style=style))  # Text: what data and paths hold is no markup
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH).print(table)
