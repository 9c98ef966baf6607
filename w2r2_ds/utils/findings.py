"""Count findings and messages by kind, so that a report has one line per kind instead of one per file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?")


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


def by_pattern(messages: Iterable[tuple[str, str]]) -> list[str]:
    """One line per pattern, in order of appearance: the first message, and how many others are like it.

    Messages have the same pattern if they differ only in the name of the scene and in numbers.

    Args:
        messages: name of the scene, which may be empty, and message.
    """
    groups: dict[str, list[str]] = {}
    for scene_id, message in messages:
        named = message.replace(scene_id, "SCENE") if scene_id else message
        groups.setdefault(_NUMBER.sub("#", named), []).append(message)
    return [
        first if not others else f"{first} (and {len(others)} more of this kind)" for first, *others in groups.values()
    ]
