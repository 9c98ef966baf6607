"""Export a checkpoint as a PEFT adapter: ``w2r2 export --checkpoint RUN --out ADAPTER``."""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.commands.common import command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors


@reports_errors("export")
def main(args: list[str] | None = None) -> None:
    """Run the command; returns the exit code."""
    run(**parse(function_parser(run, "w2r2 export"), command_words(args)))


def run(checkpoint: Path, out: Path, vlm: str | None = None, geometry_path: str | None = None) -> None:
    """Export a checkpoint as a PEFT adapter directory with geometry_merger.safetensors and a model card.

    Args:
        checkpoint: folder of a run or checkpoint.
        out: new folder of the adapter.
        vlm: directory or hub id of the VLM; default: the one of training.
        geometry_path: directory or hub id of the geometry encoder; default: the one of training.
    """
    from w2r2_ds.convert.peft_adapter import export_adapter

    print(f"adapter: {export_adapter(checkpoint, out, vlm, geometry_path)}")
