"""What one check finds: rows to show, what must be equal on all nodes, what is wrong and what may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class CheckResult:
    """Of one check on one node or rank.

    Args:
        shown: name -> value, for the table.
        equal: name -> value that every node must have alike.
        wrong: sentences, each with what to do; any of them makes the doctor fail.
        warnings: sentences about what works here and may not elsewhere.
        alike: name -> value that every node should have alike; where not, that is a warning.
    """

    shown: dict[str, str] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    alike: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """Everything that one rank found.

    Args:
        rank: global rank.
        local_rank: on its node.
        host: name of its node.
        outcomes: by the check's name, in the order in which they were done.
    """

    rank: int
    local_rank: int
    host: str
    outcomes: dict[str, CheckResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the store."""
        return asdict(self)

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Report:
        """The reverse of `to_json`."""
        outcomes = {name: CheckResult(**found) for name, found in tree["outcomes"].items()}
        return Report(tree["rank"], tree["local_rank"], tree["host"], outcomes)
