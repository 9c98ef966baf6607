"""The doctor, top to bottom: look at this node, meet the others, measure together, compare, say what is wrong.

Alone it looks at one machine. In a launch every rank runs it; rank 0 prints, and all exit alike. It takes a minute at
most from the last rank's import of torch, which may itself take four where an environment lies on a slow file system:
a rank that has not come 280 s after rank 0 began is named, and the others are reported, within another minute.
"""

from __future__ import annotations

import importlib
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

from w2r2_ds.doctor import timeouts as limits_of_time
from w2r2_ds.doctor.checks import DoctorRequest, do_checks, driver_silent, node_checks, rank_checks
from w2r2_ds.doctor.clocks import answer_clocks, ask_clock, judge
from w2r2_ds.doctor.compare import differences
from w2r2_ds.doctor.disk import check_mark, leave_mark
from w2r2_ds.doctor.imports import Imports, installed_modules
from w2r2_ds.doctor.place import Place, allocated_hosts, find_place
from w2r2_ds.doctor.rendezvous import Coming, Meeting, Unreachable, missing_sentences
from w2r2_ds.doctor.report import Sentence, sentences, show
from w2r2_ds.doctor.result import CheckResult, Report
from w2r2_ds.doctor.timeouts import Alarm, TooLong, bounded, brief, last_resort
from w2r2_ds.utils.sanitize import message

# Seconds in which torch must be imported, and as long as that goes on, from however slow a file system.
TORCH, TORCH_AT_WORK = 20.0, 240.0
# Seconds after the process began until which the other ranks are waited for, and after the import of torch at least.
COMING, CAME = TORCH_AT_WORK + 40.0, 40.0
# Seconds after a rank has met rank 0, or rank 0 the last one, at which each part must be through.
LOOKED, READY, REPORTED, ALL = 38.0, 44.0, 57.0, 60.0
# Seconds for what the ranks do together; the all-reduce, with the start of NCCL, has what is left, and this at most.
CLOCKS, MARK, REDUCE = 3.0, 3.0, 60.0
# Seconds to report after the all-reduce.
REPORTING = 2.0


def examine(asked: DoctorRequest) -> int:
    """Look at everything, print it on rank 0, and return the exit status: 0 if nothing is wrong, 1 otherwise."""
    try:
        place = find_place()
    except ValueError as error:
        print(f"doctor: {message(error)}", file=sys.stderr)
        return 1
    report = Report(place.rank, place.local_rank, place.host)
    if asked.refused:
        report.outcomes["command line"] = CheckResult(wrong=[message(asked.refused)])
    last_resort(TORCH_AT_WORK + ALL)
    usable = import_torch(report)
    alarm = Alarm(ALL, place.host)
    imports = Imports(installed_modules()) if usable and place.leads else None
    meeting = meet(place, report, alarm) if usable and place.world > 1 else None
    coming = Coming(meeting, patience()) if meeting is not None and place.rank == 0 else None
    look(asked, place, report, alarm, usable)
    if imports is not None:
        alarm.now("importing libraries")
        report.outcomes["imports"] = imports.result(alarm.left(LOOKED))
    code = alone(report) if meeting is None else in_launch(asked, meeting, coming, report, alarm)
    alarm.off()
    return code


def patience() -> float:
    """Seconds for which other ranks are still waited for: as long as they may import torch."""
    return max(CAME, limits_of_time.STARTED + COMING - time.monotonic())


def meet(place: Place, report: Report, alarm: Alarm) -> Meeting | None:
    """Come to rank 0's store, which is there once rank 0 has imported torch; None, and a sentence, if it never is."""
    alarm.renew(patience() + ALL)
    alarm.now("meeting rank 0")
    try:
        meeting = Meeting(place, patience())
        meeting.say("here", {"host": place.host, "leads": place.leads})
    except (Unreachable, ImportError, ConnectionError) as error:
        report.outcomes["meeting"] = CheckResult(wrong=[str(error)])
        return None
    finally:
        alarm.renew(ALL)

    def tell(doing: str) -> None:
        with suppress(ConnectionError):  # the checks go on without rank 0; what they find is printed here then
            meeting.say("phase", doing)

    alarm.listener = tell
    return meeting


def import_torch(report: Report) -> bool:
    """Import it here too, as this process needs it; a reason why not is one of the report's."""
    try:
        bounded(lambda: importlib.import_module("torch.distributed"), TORCH, TORCH_AT_WORK)
    except TooLong:
        report.outcomes["torch"] = CheckResult(
            wrong=["importing torch hangs; look at the file system of the environment."]
        )
    except Exception as error:  # a broken library raises anything
        report.outcomes["torch"] = CheckResult(wrong=[f"torch cannot be imported ({brief(error)}); install it again."])
    return "torch" not in report.outcomes


def look(asked: DoctorRequest, place: Place, report: Report, alarm: Alarm, torch_usable: bool) -> None:
    """This rank's own checks; without torch only those of the node that do without it."""
    if place.leads:
        report.outcomes |= do_checks(node_checks(asked, place, torch_usable), alarm, LOOKED)
    if torch_usable:
        report.outcomes |= do_checks(rank_checks(asked, place), alarm, LOOKED, report.outcomes)


def alone(report: Report) -> int:
    """Print one machine's report, or that of a rank that cannot reach the others."""
    return conclude([report], sentences([report]))


def in_launch(asked: DoctorRequest, meeting: Meeting, coming: Coming | None, report: Report, alarm: Alarm) -> int:
    """Measure together, and agree on the exit status; a rank that loses rank 0 prints what it found itself.

    Args:
        asked: what for.
        meeting: of this rank with the others.
        coming: rank 0's, who comes; None elsewhere.
        report: of this rank.
        alarm: of this process.
    """
    alarm.now("waiting for the other ranks")
    try:
        meeting.say("ready", 0)
        if coming is None:
            return follow(asked, meeting, report, alarm)
        found, reports, reporting = lead(asked, meeting, coming, report, alarm)
    except (TimeoutError, ConnectionError) as error:
        report.outcomes["meeting"] = CheckResult(wrong=[f"rank 0 has stopped ({error}); look at its log."])
        return alone(report)
    code = conclude(reports, found)
    with suppress(ConnectionError):  # torchrun's agent, which holds the store, may be gone
        meeting.say("verdict", code)
        meeting.gather("bye", reporting, alarm.left())  # they read the verdict from this process
    return code


def follow(asked: DoctorRequest, meeting: Meeting, report: Report, alarm: Alarm) -> int:
    """What every other rank does when it is ready.

    Raises:
        TimeoutError: rank 0 does not answer.
        ConnectionError: it is gone.
    """
    alarm.renew(patience() + READY + ALL)
    meeting.hear("all", 0, patience() + READY)  # rank 0 does its own checks before
    alarm.renew(ALL)
    ready, seconds = meeting.hear("go", 0, alarm.left(REPORTED))
    if len(ready) == meeting.place.world:
        together(asked, meeting, report, alarm, time.monotonic() + seconds)
    meeting.say("report", report.to_json())
    code = int(meeting.hear("verdict", 0, alarm.left(ALL)))
    with suppress(ConnectionError):
        meeting.say("bye", 0)
    return code


def lead(
    asked: DoctorRequest, meeting: Meeting, coming: Coming, report: Report, alarm: Alarm
) -> tuple[list[Sentence], list[Report], list[int]]:
    """What rank 0 does: wait for the others, measure with them, gather what they found.

    Returns:
        What there is to say, the reports, and the other ranks that reported.

    Raises:
        ConnectionError: the store, which is torchrun's then, is gone.
    """
    ranks = range(meeting.place.world)
    alarm.renew(patience() + ALL)
    here, when = coming.result()
    alarm.renew(ALL, when)
    meeting.say("all", 0)
    ready = sorted(meeting.gather("ready", here, alarm.left(READY)))
    seconds = min(REDUCE, max(0.0, alarm.left(REPORTED) - REPORTING))
    meeting.say("go", [ready, seconds])
    if len(ready) == len(ranks):
        together(asked, meeting, report, alarm, time.monotonic() + seconds)
    meeting.say("report", report.to_json())
    alarm.now("waiting for the reports of the other ranks")
    # All ranks began the last thing together, so that the others are through soon or never.
    trees = meeting.gather("report", ready, min(REPORTED - READY, max(REPORTING, alarm.left(REPORTED))))
    reports = [Report.from_json(trees[rank]) for rank in sorted(trees)]
    hosts = {rank: said["host"] for rank, said in here.items()}
    found = [
        Sentence(True, "", text)
        for text in missing_sentences([rank for rank in ranks if rank not in here], hosts, allocated_hosts(), COMING)
    ]
    for rank in sorted(set(here) - set(trees)):
        phase = meeting.gather("phase", [rank], 0).get(rank, "its own checks")
        text = f"rank {rank} came, but is not through, the last known of it is: {phase}; look at its log and its node."
        found.append(Sentence(True, hosts[rank], text))
    found += sentences(reports)
    leaders = [each for each in reports if here[each.rank]["leads"]]
    found += [Sentence(True, host, text) for host, text in differences(leaders)]
    found += [Sentence(False, host, text) for host, text in differences(leaders, doubtful=True)]
    return found, reports, sorted(set(trees) - {0})


def together(asked: DoctorRequest, meeting: Meeting, report: Report, alarm: Alarm, end: float) -> None:
    """What takes two: a folder that all see, clocks, an all-reduce. All ranks are there when it begins.

    Args:
        asked: what for.
        meeting: of the ranks.
        report: of this rank.
        alarm: told what is being done.
        end: reading of the monotonic clock at which it must be over.

    Raises:
        TimeoutError: rank 0 does not answer.
        ConnectionError: the store is gone.
    """
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
            text = f"the clock could not be measured in time ({error}); rank 0 may be busy: compare `date` by hand."
            report.outcomes["clock"] = CheckResult(warnings=[text])
    if asked.config is not None:
        shared_out(Path(asked.config.out), meeting, report, alarm, first)
    alarm.now("doing an all-reduce")
    gpu = not driver_silent(report.outcomes)
    report.outcomes["all-reduce"] = all_reduce(meeting, len(leaders) + 1, max(1.0, end - time.monotonic()), gpu)
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
            report.outcomes["shared out"] = CheckResult(wrong=[f"out: {out} does not answer; look at its file system."])
    meeting.say("seen", 0)


def all_reduce(meeting: Meeting, nodes: int, seconds: float, driver: bool) -> CheckResult:
    """Over NCCL if every rank has a GPU, else over gloo; whatever goes wrong is a sentence.

    Args:
        meeting: of the ranks.
        nodes: among which they are.
        seconds: for all of it.
        driver: whether the GPU driver can be asked.
    """
    import torch

    from w2r2_ds.doctor.collective import check_all_reduce

    meeting.say("gpu", driver and torch.cuda.is_available())
    end = time.monotonic() + seconds
    gpus = meeting.gather("gpu", range(meeting.place.world), seconds / 2)
    backend = "nccl" if all(gpus.values()) else "gloo"
    left = end - time.monotonic()
    try:
        return bounded(lambda: check_all_reduce(meeting, backend, nodes, left), left + 1)
    except TooLong:
        why = f"it had not ended after {seconds:.0f} s"
    except Exception as error:  # every backend has its own
        why = brief(error)
    return CheckResult(
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
