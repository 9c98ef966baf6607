"""Run the whole pipeline without downloads: ``w2r2 demo``, or ``make demo``."""

from __future__ import annotations

from w2r2_ds.commands.common import DemoOptions, command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors


@reports_errors("demo")
def main(args: list[str] | None = None) -> None:
    """Run the demo; returns the exit code."""
    run(**parse(function_parser(run, "w2r2 demo"), command_words(args)))


def run(demo: DemoOptions = DemoOptions()) -> None:  # noqa: B008
    """Make synthetic rooms in runs/demo, train the tiny pretrained model under ZeRO-3, diagnose, export, print a table.

    It takes minutes. Finished steps of an earlier demo are reused.

    Args:
        demo: options of the demo.
    """
    from w2r2_ds.demo.run import run_demo

    run_demo(demo.geometry)
