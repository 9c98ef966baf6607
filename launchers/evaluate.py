"""Evaluate: ``python launchers/evaluate.py --checkpoint RUN --geometry fused``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from w2r2_ds.command_line import Parser
from w2r2_ds.evaluation.evaluate import evaluate


def main(
    checkpoint: Path,
    task: Literal["scanrefer"] = "scanrefer",
    geometry: Literal["fused", "zero"] = "fused",
    out: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    limit: int = 0,
    root: Path | None = None,
    vlm: str | None = None,
    vggt: str | None = None,
) -> None:
    """Answer the validation split greedily and score it.

    Args:
        checkpoint: run, checkpoint or exported adapter.
        task: what to evaluate.
        geometry: fused, or zero for the 2D-only pass.
        out: folder for predictions and scores; CHECKPOINT/evaluation without it.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
        limit: number of samples, 0 for all.
        root: folder of the data, if not where it was in training.
        vlm: directory or hub id of the video LLM, if not where it was in training.
        vggt: directory or hub id of VGGT, if not where it was in training.
    """
    out = out or checkpoint / "evaluation"
    scores = evaluate(checkpoint, out, geometry, batch_size, max_new_tokens, limit, root=root, vlm=vlm, vggt=vggt)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, parser_class=Parser)
    except ValueError as error:
        sys.exit(f"evaluate.py: {error}")
