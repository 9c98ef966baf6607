"""Run the checks of this node and of all ranks, compare the nodes and print a report.

Without a launcher it checks one machine. In a launch every rank runs it; rank 0 prints the report of all ranks, and all
ranks return the same exit code. Checks and collectives have time limits. These need a running Python: if a call into a
library or driver never releases the GIL, the timer of `faulthandler`, a C thread, ends the process with a traceback.
"""

from __future__ import annotations

import faulthandler
import logging
from pathlib import Path

from w2r2_ds.doctor.checks import DoctorRequest, node_checks, rank_checks, run_checks
from w2r2_ds.doctor.report import findings, show
from w2r2_ds.doctor.result import CheckResult, RankReport
from w2r2_ds.doctor.timeouts import brief
from w2r2_ds.utils.distributed import RankInfo, host_name
from w2r2_ds.utils.sanitize import message

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 900.0
"""Time limit of the whole run in seconds: checks, waiting for other ranks, collectives."""


def examine(request: DoctorRequest) -> int:
    """Run all checks and print the report on rank 0; returns the exit code: 0 without errors, else 1."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    try:
        ranks = RankInfo.from_environment()
    except ValueError as error:
        logger.error("doctor: %s", error)
        return 1
    report = RankReport(ranks.rank, ranks.local_rank, host_name())
    if request.command_error:
        report.results["command line"] = CheckResult(errors=[message(request.command_error)])
    if ranks.local_rank == 0:
        report.results |= run_checks(node_checks(request, ranks))
    if not driver_fails(report):
        report.results |= run_checks(rank_checks(request, ranks))
    reports = check_together(request, ranks, report) if ranks.world_size > 1 else [report]
    found = findings(reports)
    if ranks.rank == 0 or len(reports) == 1:  # a rank without connection prints its own report
        show(reports, found)
    faulthandler.cancel_dump_traceback_later()
    return int(any(finding.error for finding in found))


def driver_fails(report: RankReport) -> bool:
    """Whether nvidia-smi failed to list GPUs. Then CUDA is not called, because a call could block the whole process."""
    health = report.results.get("GPU health", CheckResult())
    return bool(health.errors) and not health.info


def check_together(request: DoctorRequest, ranks: RankInfo, report: RankReport) -> list[RankReport]:
    """Run the checks that need all ranks and gather their reports, rank 0 first.

    If the ranks cannot communicate, the result is this rank's report with an error.
    """
    try:
        import torch

        from w2r2_ds.doctor.checks import network

        network.connect(ranks, report.host)
        hosts = {each.host for each in network.gather_reports(report)}
        if request.config is not None:
            report.results["shared out"] = network.check_shared_folder("out", Path(request.config.out))
        use_gpu = not driver_fails(report) and torch.cuda.is_available()
        report.results["all-reduce"] = network.check_all_reduce(ranks, use_gpu, len(hosts))
        return network.gather_reports(report)
    except Exception as error:  # torch's communication errors have several types
        report.results["ranks"] = CheckResult(
            errors=[
                f"rank {ranks.rank} has no connection to other ranks ({brief(error)}); check their nodes and logs, and "
                "the network between them."
            ]
        )
        return [report]
