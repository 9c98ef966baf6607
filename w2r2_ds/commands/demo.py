"""Run the whole pipeline without downloads: ``w2r2 demo``, or ``make demo``."""

from __future__ import annotations

from w2r2_ds.commands.common import command_words, function_parser, parse, report_error


def main(args: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    try:
        run(**parse(function_parser(run, "w2r2 demo"), command_words(args)))
    except (ValueError, OSError) as error:
        return report_error("demo", error)
    return 0


def run() -> None:
    """Make synthetic rooms and a tiny model in runs/demo, train under ZeRO-3, evaluate, export, print a table.

    It takes minutes. Finished steps of an earlier demo are reused.
    """
    from w2r2_ds.demo.run import run_demo

    run_demo()
