"""Count findings by kind, so that a message has one line per kind instead of one per file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One observation about an input file.

    Attributes:
        kind: plural noun phrase that is equal for all findings of the kind, e.g. ``objects without vertices``.
        example: where it was found, e.g. the file, or scene and object.
        count: number of occurrences that this finding stands for.
    """

    kind: str
    example: str
    count: int = 1


def by_kind(findings: Iterable[Finding]) -> list[str]:
    """One line per kind, in order of appearance: the number of occurrences, the kind, and the first example."""
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for finding in findings:
        counts[finding.kind] = counts.get(finding.kind, 0) + finding.count
        examples.setdefault(finding.kind, finding.example)
    return [f"{counts[kind]} {kind}, such as {examples[kind]}" for kind in counts]
