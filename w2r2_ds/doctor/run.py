"""The doctor: check this node, connect to the other ranks, check them together, compare the nodes, print a report.

Without a launcher it checks one machine. In a launch every rank runs it; rank 0 prints, and all return the same exit
code. Nothing waits without a limit: checks and collectives have time-outs, and `faulthandler` ends the process with a
traceback if a call into a library or driver blocks all of Python.
"""

from __future__ import annotations

import faulthandler
import logging
from pathlib import Path

from w2r2_ds.doctor.checks import DoctorRequest, node_checks, rank_checks, run_checks
from w2r2_ds.doctor.report import findings, show
from w2r2_ds.doctor.result import CheckResult, Report
from w2r2_ds.doctor.timeouts import brief
from w2r2_ds.utils.distributed import RankInfo, host_name
from w2r2_ds.utils.sanitize import message

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 900.0
"""For everything: checks, waiting for other ranks, collectives."""


def examine(request: DoctorRequest) -> int:
    """Run all checks and print the report on rank 0; returns the exit code: 0 without errors, else 1."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    try:
        ranks = RankInfo.from_environment()
    except ValueError as error:
        logger.error("doctor: %s", error)
        return 1
    report = Report(ranks.rank, ranks.local_rank, host_name())
    if request.command_error:
        report.results["command line"] = CheckResult(errors=[message(request.command_error)])
    if ranks.local_rank == 0:
        report.results |= run_checks(node_checks(request, ranks))
    if not driver_silent(report):
        report.results |= run_checks(rank_checks(request, ranks))
    reports = check_together(request, ranks, report) if ranks.world_size > 1 else [report]
    found = findings(reports)
    if ranks.rank == 0 or len(reports) == 1:  # a rank that cannot reach the others prints its own report
        show(reports, found)
    faulthandler.cancel_dump_traceback_later()
    return int(any(finding.error for finding in found))


def driver_silent(report: Report) -> bool:
    """Whether nvidia-smi lists no GPU. A call into such a driver may block the whole process, so none is made."""
    health = report.results.get("GPU health", CheckResult())
    return bool(health.errors) and not health.info


def check_together(request: DoctorRequest, ranks: RankInfo, report: Report) -> list[Report]:
    """Checks that need all ranks.

    Returns:
        The reports of all ranks; only this rank's, with an error, if the ranks cannot communicate.
    """
    try:
        import torch

        from w2r2_ds.doctor.checks import network

        network.connect(ranks, report.host)
        hosts = {each.host for each in network.gather_reports(report)}
        if request.config is not None:
            report.results["shared out"] = network.check_shared_folder("out", Path(request.config.out))
        use_gpu = not driver_silent(report) and torch.cuda.is_available()
        report.results["all-reduce"] = network.check_all_reduce(ranks, use_gpu, len(hosts))
        return network.gather_reports(report)
    except Exception as error:  # torch's communication errors have several types; the report must be printed
        report.results["ranks"] = CheckResult(
            errors=[
                f"rank {ranks.rank} lost or never had contact to other ranks ({brief(error)}); check their nodes and "
                "logs, and the network between them."
            ]
        )
        return [report]
