"""Report of a run, or of several side by side: ``w2r2 report --run RUN``, one HTML file that works offline."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from w2r2_ds.commands.common import command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.utils.logging import stdout_to_stderr

logger = logging.getLogger(__name__)


@reports_errors("report")
def main(args: list[str] | None = None) -> None:
    """Run the command; returns the exit code."""
    parser = function_parser(run, "w2r2 report", skip=("runs", "results"))
    parser.add_argument("--run", action="append", required=True, metavar="RUN", help=RUN)
    parser.add_argument("--results", action="append", metavar="FOLDER", help=RESULTS)
    values = parse(parser, command_words(args))
    with stdout_to_stderr():
        runs, results = ([Path(text) for text in values.pop(name) or []] for name in ("run", "results"))
        file = run(runs, results, **values)
    print(file)


RUN = "Folder of a run. The option may be repeated: the runs are shown side by side."
"""Help of ``--run``."""
RESULTS = (
    "Folder with results of w2r2 evaluate and w2r2 diagnose, searched with all folders below; may be repeated, for one "
    "run only. Default: the run's folder."
)
"""Help of ``--results``."""


def run(runs: list[Path], results: list[Path], out: Path | None = None, samples: int = 12, rooms: int = 2) -> Path:
    """Write one self-contained HTML page: configuration, curves, scores, samples and 3D views; returns its path.

    Args:
        runs: folders of runs.
        results: folders with results, for one run only.
        out: HTML file; default: report.html in the folder of the first run.
        samples: number of samples in the gallery, per task and run.
        rooms: number of 3D views, per run.
    """
    # Imported here because torch, plotly and pyarrow are slow to import.
    from w2r2_ds.report.collect import read_run, run_names
    from w2r2_ds.utils.files import atomic_io
    from w2r2_ds.utils.files.output_folder import make_folder
    from w2r2_ds.utils.packages import import_problem

    for package in ("plotly", "jinja2"):
        if problem := import_problem(package):
            raise ValueError(f"{package} {problem}: pip install 'w2r2-ds[report]'.")
    if results and len(runs) > 1:
        raise ValueError("--results is for one run; of several runs, results in their own folders are shown.")
    for option, value in (("samples", samples), ("rooms", rooms)):
        if value < 0:
            raise ValueError(f"--{option} is {value}; it must be at least 0.")
    from w2r2_ds.report.page import build_page

    found = [read_run(folder, name, results) for folder, name in zip(runs, run_names(runs), strict=True)]
    file = out or runs[0] / "report.html"
    page = build_page(found, samples, rooms)
    make_folder(file.parent)
    atomic_io.replace(file, page)
    return file


def report_of_finished_run(folder: Path, write: bool) -> str:
    """Path of a finished run's report, or the command that makes it. Never raises: the run has been trained.

    Args:
        folder: folder of the run.
        write: write the report (`train.report`); if that fails, the reason is logged.
    """
    command = f"w2r2 report --run {shlex.quote(str(folder))}"
    if not write:
        return command
    try:
        return str(run([folder], []))
    except ValueError as error:  # a missing package, or a file of the run
        logger.error("the run is complete, but its report is not written: %s Make it with: %s", error, command)
    except Exception:
        logger.exception("the run is complete, but its report could not be written; make it with: %s", command)
    return command
