"""Run a benchmark: ``w2r2 bench step_time [--json FILE]``. docs/research/measurements.md has the results.

On a GPU the same commands use CUDA events; ``--shape 3b --frames [8,16,24]`` takes the real architectures.
"""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.bench import BENCHMARKS, load
from w2r2_ds.commands.common import command_words, function_parser, parse, report_error
from w2r2_ds.config.cli import Parser


def main(args: list[str] | None = None) -> int:
    """Run one benchmark, print its report and save it with ``--json``; returns the exit code."""
    try:
        words = command_words(args)
        parser = Parser(prog="w2r2 bench", description="Benchmarks of speed and memory.")
        commands = parser.add_subcommands(dest="benchmark")
        named = next((word for word in words if word in BENCHMARKS), "")
        for name, description in BENCHMARKS.items():
            # Only the named benchmark is imported: importing all takes seconds.
            command = function_parser(load(name), f"w2r2 bench {name}") if name == named else Parser()
            command.add_argument("--json", type=Path | None, help="File for the report in JSON.")
            commands.add_subcommand(name, command, help=description)
        values = parse(parser, words)
        options = values[values["benchmark"]]
        target = options.pop("json")
        report = load(values["benchmark"])(**options)
        report.show()
        if target is not None:
            report.save(target)
    except (ValueError, OSError) as error:
        return report_error("bench", error)
    return 0
