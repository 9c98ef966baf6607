"""Results of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CheckResult:
    """Result of one check on one node or rank.

    Attributes:
        info: name -> value, shown in a table.
        must_match: name -> value that has to be equal on all nodes; a difference is an error.
        should_match: name -> value that is usually equal on all nodes; a difference is a warning.
        errors: messages with a cause and a remedy; any error makes the exit code 1.
        warnings: messages about possible problems.
    """

    info: dict[str, str] = field(default_factory=dict)
    must_match: dict[str, str] = field(default_factory=dict)
    should_match: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class RankReport:
    """Results of one rank.

    Attributes:
        rank, local_rank, host: process and node of the rank.
        results: name of the check -> result, in order; those of local rank 0 include the checks of its node.
    """

    rank: int
    local_rank: int
    host: str
    results: dict[str, CheckResult] = field(default_factory=dict)
