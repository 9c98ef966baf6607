"""Results of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CheckResult:
    """Result of one check on one node or rank.

    Args:
        info: name -> value, rows of the table.
        must_match: name -> value that has to be equal on all nodes; a difference is an error.
        should_match: name -> value that is usually equal on all nodes; a difference is a warning.
        errors: messages that say what is wrong and what to do; any of them makes the doctor fail.
        warnings: messages about what may be wrong.
    """

    info: dict[str, str] = field(default_factory=dict)
    must_match: dict[str, str] = field(default_factory=dict)
    should_match: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Results of one rank by the name of the check, in order; local rank 0 also ran the checks of its node."""

    rank: int
    local_rank: int
    host: str
    results: dict[str, CheckResult] = field(default_factory=dict)
