"""What must be the same on every node is compared with the node of rank 0."""

from __future__ import annotations

from w2r2_ds.doctor.result import Report

MANY = 4
"""Differences of one check on one node that are spelt out."""


def differences(reports: list[Report], doubtful: bool = False) -> list[tuple[str, str]]:
    """Host and sentence for every difference.

    Args:
        reports: of ranks that lead their node, rank 0 first.
        doubtful: of what should be alike instead of what must be equal.
    """
    if not reports:
        return []
    first, *others = reports
    found = []
    for report in others:
        for check, outcome in report.outcomes.items():
            if check not in first.outcomes:
                continue
            mine, theirs = first.outcomes[check].equal, outcome.equal
            if doubtful:
                mine, theirs = first.outcomes[check].alike, outcome.alike
            sentences = [
                f"{name} is {theirs[name]} here, but {mine[name]} on {first.host}; make the nodes the same."
                for name in mine
                if name in theirs and mine[name] != theirs[name]
            ]
            # What cannot be read at all has its own sentence; a package that only one node has is told here.
            if check == "versions" and not doubtful:
                sentences += [
                    f"{name} is missing here; {first.host} has it: install it." for name in mine.keys() - theirs
                ]
                sentences += [f"{name} is installed here, not on {first.host}." for name in theirs.keys() - mine]
            if len(sentences) > MANY:
                sentences[MANY:] = [f"{len(sentences) - MANY} more of {check} differ from {first.host}."]
            found += [(report.host, sentence) for sentence in sentences]
    return found
