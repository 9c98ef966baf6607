"""How far a node's clock is from rank 0's, measured by round trips: nobody's word is taken for when a message arrived.

A node notes its time, asks, and notes its time again when the answer, rank 0's clock, is there. Rank 0 read its clock
somewhere in between; halfway is the best guess, and half the round trip the most it can be wrong (Cristian's method).
Of several trips the shortest says most.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from w2r2_ds.doctor.rendezvous import Meeting
from w2r2_ds.doctor.result import CheckResult

TRIPS = 5
MOST = 2.0
"""Seconds that clocks may differ: file times decide what is newest, and logs of ranks are read side by side."""


@dataclass(frozen=True)
class Skew:
    """Seconds by which this node's clock is ahead of rank 0's, and by how much that may be wrong."""

    ahead: float
    uncertain: float


def answer_clocks(meeting: Meeting, leaders: list[int], seconds: float) -> None:
    """Rank 0's part: tell each leader what time it is as soon as it asks; no longer than `seconds` for all of them."""
    end = time.monotonic() + seconds
    trips = dict.fromkeys(leaders, 0)
    while trips and time.monotonic() < end:
        for rank, trip in list(trips.items()):
            if meeting.said(f"clock-ask-{trip}", rank):
                meeting.say(f"clock-{rank}-{trip}", time.time())
                trips[rank] += 1
                if trips[rank] == TRIPS:
                    del trips[rank]
        time.sleep(0.001)


def ask_clock(meeting: Meeting, seconds: float) -> Skew:
    """A leader's part: the skew by the shortest of several round trips.

    Raises:
        TimeoutError: rank 0 does not answer.
    """
    skews = []
    end = time.monotonic() + seconds
    for trip in range(TRIPS):
        before, started = time.time(), time.monotonic()
        meeting.say(f"clock-ask-{trip}", 0)
        theirs = meeting.hear(f"clock-{meeting.place.rank}-{trip}", 0, end - time.monotonic())
        half = (time.monotonic() - started) / 2
        skews.append(Skew(before + half - theirs, half))
    return min(skews, key=lambda skew: skew.uncertain)


def judge(skew: Skew, first_host: str) -> CheckResult:
    """Wrong if the clocks differ by more than allowed, even at the friendlier end of what the measurement leaves."""
    outcome = CheckResult(shown={"clock": f"{skew.ahead:+.3f} s of {first_host}'s, within {skew.uncertain:.3f}"})
    if abs(skew.ahead) - skew.uncertain > MOST:
        way = "ahead of" if skew.ahead > 0 else "behind"
        outcome.wrong.append(
            f"the clock is {abs(skew.ahead):.1f} s {way} that of {first_host} (at most {MOST:.0f} s are allowed); "
            "start its time service (chronyd, ntpd), and look at timedatectl."
        )
    return outcome
