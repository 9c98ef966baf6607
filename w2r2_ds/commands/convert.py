"""Convert checkpoints of other projects: ``w2r2 convert from-vgllm --source VGLLM --out FOLDER``."""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.commands.common import command_words, description, function_parser, parse, report_error
from w2r2_ds.config.cli import Parser


def main(args: list[str] | None = None) -> int:
    """Convert a checkpoint; returns the exit code."""
    parser = Parser(prog="w2r2 convert", description="Convert checkpoints of other projects.")
    commands = parser.add_subcommands(dest="format")
    for name, function in CONVERSIONS.items():
        commands.add_subcommand(name, function_parser(function, f"w2r2 convert {name}"), help=description(function))
    try:
        values = parse(parser, command_words(args))
        CONVERSIONS[values["format"]](**values[values["format"]])
    except (ValueError, OSError) as error:
        return report_error("convert", error)
    return 0


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
