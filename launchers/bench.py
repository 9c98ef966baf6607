"""Measure: ``python launchers/bench.py step_ratio [--json FILE]``. docs/performance.md says what came of it.

On a GPU the same commands use CUDA events; ``--shape 3b --frames 8 16 24`` takes the real architectures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from w2r2_ds.bench import BENCHMARKS, load
from w2r2_ds.config.cli import Parser
from w2r2_ds.utils.sanitize import message


def main(args: list[str]) -> None:
    """Run one benchmark, print its table and write it as JSON where asked."""
    parser = Parser(description="The benchmarks behind every claim about speed or memory.")
    commands = parser.add_subcommands(dest="benchmark")
    asked = [name for name in args if name in BENCHMARKS][:1] or BENCHMARKS
    for name in asked:  # importing all of them takes seconds
        command = Parser(description=load(name).__doc__.splitlines()[0])
        command.add_function_arguments(load(name))
        command.add_argument("--json", type=Path | None, help="write the result here too")
        commands.add_subcommand(name, command, help=command.description)
    values = parser.parse_args(args).as_dict()
    options = values[values["benchmark"]]
    target = options.pop("json")
    report = load(values["benchmark"])(**options)
    report.show()
    if target is not None:
        report.save(target)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {message(error)}")
