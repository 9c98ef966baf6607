"""The doctor, top to bottom: look at this node, meet the others, measure together, compare, say what is wrong.

Alone it looks at one machine. In a launch every rank runs it; rank 0 prints, and all exit alike.
"""

from __future__ import annotations

import importlib
import secrets
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from w2r2_ds.planning.bounded import Alarm, TooLong, bounded, one_line
from w2r2_ds.planning.checks import Asked, do_checks, node_checks, rank_checks
from w2r2_ds.planning.clocks import answer_clocks, ask_clock, judge
from w2r2_ds.planning.compare import differences
from w2r2_ds.planning.disk import check_mark, leave_mark
from w2r2_ds.planning.imports import Imports, installed_modules
from w2r2_ds.planning.meeting import Meeting, Unreachable, missing_sentences
from w2r2_ds.planning.outcome import Outcome, Report
from w2r2_ds.planning.place import Place, allocated_hosts, find_place
from w2r2_ds.planning.table import Sentence, sentences, show
from w2r2_ds.printable import message

# Seconds in which torch must be imported, and as long as that goes on, from however slow a file system.
TORCH, TORCH_AT_WORK = 20.0, 240.0
# Seconds after that at which each part must be through.
LOOKED, CAME, READY, REPORTED, ALL = 38.0, 40.0, 44.0, 57.0, 60.0
# Seconds for what the ranks do together.
CLOCKS, MARK, REDUCE = 3.0, 3.0, 8.0


def examine(asked: Asked) -> int:
    """Look at everything, print it on rank 0, and return the exit status: 0 if nothing is wrong, 1 otherwise."""
    try:
        place = find_place()
    except ValueError as error:
        print(f"doctor: {message(error)}", file=sys.stderr)
        return 1
    report = Report(place.rank, place.local_rank, place.host)
    if asked.refused:
        report.outcomes["command line"] = Outcome(wrong=[asked.refused])
    usable = import_torch(report)
    alarm = Alarm(ALL, place.host)
    imports = Imports(installed_modules()) if usable and place.leads else None
    meeting = None
    if usable and place.world > 1:
        alarm.now("meeting the other ranks")
        try:
            meeting = Meeting(place, alarm.left(CAME))
            meeting.say("here", {"host": place.host, "leads": place.leads})
            alarm.listener = partial(meeting.say, "phase")
        except (Unreachable, ImportError) as error:
            report.outcomes["meeting"] = Outcome(wrong=[str(error)])
    look(asked, place, report, alarm, usable)
    if imports is not None:
        alarm.now("importing libraries")
        report.outcomes["imports"] = imports.result(alarm.left(LOOKED))
    code = alone(report) if meeting is None else in_launch(asked, meeting, report, alarm)
    alarm.off()
    return code


def import_torch(report: Report) -> bool:
    """Import it here too, as this process needs it; a reason why not is one of the report's."""
    try:
        bounded(lambda: importlib.import_module("torch.distributed"), TORCH, TORCH_AT_WORK)
    except TooLong:
        report.outcomes["torch"] = Outcome(wrong=["importing torch hangs; look at the file system of the environment."])
    except Exception as error:  # a broken library raises anything
        report.outcomes["torch"] = Outcome(wrong=[f"torch cannot be imported ({one_line(error)}); install it again."])
    return "torch" not in report.outcomes


def look(asked: Asked, place: Place, report: Report, alarm: Alarm, torch_usable: bool) -> None:
    """This rank's own checks; without torch only those of the node that do without it."""
    if place.leads:
        report.outcomes |= do_checks(node_checks(asked, place, torch_usable), alarm, LOOKED)
    if torch_usable:
        report.outcomes |= do_checks(rank_checks(asked, place), alarm, LOOKED)


def alone(report: Report) -> int:
    """Print one machine's report, or that of a rank that cannot reach the others."""
    return conclude([report], sentences([report]))


def in_launch(asked: Asked, meeting: Meeting, report: Report, alarm: Alarm) -> int:
    """Meet, measure together, and agree on the exit status."""
    place = meeting.place
    ranks = range(place.world)
    alarm.now("waiting for the other ranks")
    meeting.say("ready", 0)
    if place.rank == 0:
        here = meeting.gather("here", ranks, alarm.left(CAME))
        meeting.say("go", sorted(meeting.gather("ready", here, alarm.left(READY))))
    try:
        ready = meeting.hear("go", 0, alarm.left(REPORTED))
        if len(ready) == place.world:
            together(asked, meeting, report, alarm)
        meeting.say("report", report.to_json())
        if place.rank != 0:
            code = int(meeting.hear("verdict", 0, alarm.left(ALL)))
            meeting.say("bye", 0)
            return code
    except TimeoutError as error:
        report.outcomes["meeting"] = Outcome(wrong=[f"rank 0 has stopped ({error}); look at its log."])
        return alone(report)
    alarm.now("waiting for the reports of the other ranks")
    # All ranks began the last thing together, so that the others are through soon or never.
    trees = meeting.gather("report", ready, min(REDUCE, alarm.left(REPORTED)))
    reports = [Report.from_json(trees[rank]) for rank in sorted(trees)]
    hosts = {rank: said["host"] for rank, said in here.items()}
    found = [
        Sentence(True, "", text)
        for text in missing_sentences([rank for rank in ranks if rank not in here], hosts, allocated_hosts(), CAME)
    ]
    for rank in sorted(set(here) - set(trees)):
        phase = meeting.gather("phase", [rank], 0).get(rank, "its own checks")
        text = f"rank {rank} came, but is not through, the last known of it is: {phase}; look at its log and its node."
        found.append(Sentence(True, hosts[rank], text))
    found += sentences(reports)
    leaders = [each for each in reports if here[each.rank]["leads"]]
    found += [Sentence(True, host, text) for host, text in differences(leaders)]
    code = conclude(reports, found)
    meeting.say("verdict", code)
    meeting.gather("bye", sorted(set(trees) - {0}), alarm.left())  # they read the verdict from this process
    return code


def together(asked: Asked, meeting: Meeting, report: Report, alarm: Alarm) -> None:
    """What takes two: a folder that all see, clocks, an all-reduce. All ranks are there when it begins."""
    place = meeting.place
    here = meeting.gather("here", range(place.world), alarm.left(REPORTED))
    first = here[0]["host"]
    leaders = [rank for rank, said in here.items() if said["leads"] and rank != 0]
    alarm.now("measuring clocks")
    if place.rank == 0:
        answer_clocks(meeting, leaders, CLOCKS)
    elif place.leads:
        try:
            report.outcomes["clock"] = judge(ask_clock(meeting, CLOCKS), first)
        except TimeoutError as error:
            report.outcomes["clock"] = Outcome(wrong=[f"the clock could not be measured ({error}); look at rank 0."])
    if asked.config is not None:
        shared_out(Path(asked.config.out), meeting, report, alarm, first)
    alarm.now("doing an all-reduce")
    report.outcomes["all-reduce"] = all_reduce(meeting, len(leaders) + 1)
    alarm.now("reporting")


def shared_out(out: Path, meeting: Meeting, report: Report, alarm: Alarm, first: str) -> None:
    """Whether `out` is one folder for all nodes: rank 0 leaves a file there, the others look for it."""
    place = meeting.place
    alarm.now("looking for a file of rank 0 in the run's folder")
    if place.rank == 0:
        mark = ""
        with suppress(OSError, TooLong):  # its own check of the folder says what is wrong
            mark = str(bounded(lambda: leave_mark(out, secrets.token_hex(8)), MARK))
        meeting.say("mark", mark)
        meeting.gather("seen", [rank for rank in range(1, place.world)], MARK + 2)
        if mark:
            Path(mark).unlink(missing_ok=True)
        return
    mark = meeting.hear("mark", 0, MARK + CLOCKS)
    if mark and place.leads:
        try:
            report.outcomes["shared out"] = bounded(lambda: check_mark("out", mark, first, MARK - 1), MARK)
        except TooLong:
            report.outcomes["shared out"] = Outcome(wrong=[f"out: {out} does not answer; look at its file system."])
    meeting.say("seen", 0)


def all_reduce(meeting: Meeting, nodes: int) -> Outcome:
    """Over NCCL if every rank has a GPU, else over gloo; whatever goes wrong is a sentence."""
    import torch

    from w2r2_ds.planning.collective import check_all_reduce

    meeting.say("gpu", torch.cuda.is_available())
    gpus = meeting.gather("gpu", range(meeting.place.world), REDUCE)
    backend = "nccl" if all(gpus.values()) else "gloo"
    try:
        return bounded(lambda: check_all_reduce(meeting, backend, nodes, REDUCE), REDUCE + 1)
    except TooLong:
        why = f"it had not ended after {REDUCE:.0f} s"
    except Exception as error:  # every backend has its own
        why = one_line(error)
    return Outcome(
        wrong=[
            f"the all-reduce over {backend} failed here ({why}); look at the ranks that are named, at firewalls "
            f"between the nodes, and at {'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME."
        ]
    )


def conclude(reports: list[Report], found: list[Sentence]) -> int:
    """Print everything and return the exit status."""
    wrong = [each for each in found if each.wrong]
    hosts = sorted({each.host for each in wrong if each.host})
    verdict = "doctor: nothing is wrong" if not wrong else f"doctor: {len(wrong)} wrong"
    if hosts:
        verdict += f", on {', '.join(hosts)}"
    show(reports, found, f"{verdict}.")
    return 1 if wrong else 0
