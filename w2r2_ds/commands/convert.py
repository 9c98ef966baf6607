"""Convert checkpoints of other projects: ``w2r2 convert from-vgllm --source VGLLM --out FOLDER``."""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.commands.common import command_words, description, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.config.cli import Parser


@reports_errors("convert")
def main(args: list[str] | None = None) -> None:
    """Convert a checkpoint; returns the exit code."""
    parser = Parser(prog="w2r2 convert", description="Convert checkpoints of other projects.")
    commands = parser.add_subcommands(dest="format")
    for name, function in CONVERSIONS.items():
        commands.add_subcommand(name, function_parser(function, f"w2r2 convert {name}"), help=description(function))
    values = parse(parser, command_words(args))
    CONVERSIONS[values["format"]](**values[values["format"]])


def from_vgllm(source: Path, out: Path) -> None:
    """Split a VG-LLM checkpoint into a Qwen2.5-VL directory, a VGGT directory, a geometry merger and model.yaml.

    Args:
        source: directory of the VG-LLM checkpoint.
        out: new folder; its model.yaml is a --config of w2r2 train.
    """
    from w2r2_ds.convert.from_vgllm import import_vgllm

    import_vgllm(source, out)
    print(f"converted: {out}")


CONVERSIONS = {"from-vgllm": from_vgllm}
"""Sub-command -> function; its parameters are the options."""
