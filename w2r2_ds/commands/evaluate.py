"""Evaluate a trained model: ``w2r2 evaluate --checkpoint RUN --task scanrefer --geometry fused``.

With several processes (``torchrun --standalone --nproc_per_node 4 launchers/evaluate.py``, or ``deepspeed``), each
answers its part of the samples. ``--score_only FILE`` scores saved predictions, or another project's, without a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from w2r2_ds.commands.common import command_words, function_parser, parse, report_error

PROTOCOL = (
    "Scoring protocols (docs/reference/metrics/): a name, several separated by commas (the option may be repeated), or "
    "all; by default the task's default protocol."
)


def main(args: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        parser = function_parser(run, "w2r2 evaluate", skip=("protocols",))
        parser.add_argument("--protocol", action="append", metavar="NAME", help=PROTOCOL)
        values = parse(parser, command_words(args))
        given = ",".join(values.pop("protocol") or [])
        run(**values, protocols=[name.strip() for name in given.split(",") if name.strip()])
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        return report_error("evaluate", error)
    return 0


def run(
    checkpoint: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    geometry: Literal["fused", "zero", "shuffle"] = "fused",
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
    limit: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    root: Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    score_only: Path | None = None,
    format: Literal["ours", "vgllm", "video3dllm"] = "ours",
    local_rank: int = 0,
) -> None:
    """Generate greedy answers to a validation set and score them.

    Args:
        checkpoint: run, checkpoint, RUN/checkpoints/best or exported adapter.
        task: scanrefer, scan2cap, scanqa, detection or another registered task: which of the run's validation sets;
            optional if all are of one task.
        data: a prepared folder instead of the run's own sets; may be relative to the root.
        geometry: fused, zero for visual-only answers, or shuffle for another scene's geometry.
        protocols: scoring protocols (docs/reference/metrics/): names, or all; the task's default if empty.
        proposals: file of detected boxes, for the protocol vgllm_refined.
        out: folder for predictions and scores; CHECKPOINT/evaluation without it.
        limit: number of samples, 0 for all.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
        root: data root, if it has moved since training.
        vlm: directory or hub id of the VLM, if it has moved since training.
        geometry_path: directory or hub id of the geometry encoder, if it has moved since training.
        score_only: predictions to score without a model; scores are printed, and written into --out if it is given.
        format: format of the --score_only file: ours, or another project's, which requires --data.
        local_rank: set by the deepspeed launcher.
    """
    # Imported after the command line is read: these import torch and transformers.
    from w2r2_ds.evaluation.predictions.rescore import score_file
    from w2r2_ds.evaluation.runner import evaluate
    from w2r2_ds.training.checkpoint.manifest import find_checkpoint
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group

    if score_only is not None:
        if checkpoint is not None:
            raise ValueError("--score_only needs no --checkpoint; leave one of the two out.")
        print(json.dumps(score_file(score_only, format, data, root, task, protocols, proposals, out), indent=2))
        return
    if checkpoint is None:
        raise ValueError("name a run, a checkpoint or an adapter with --checkpoint, or predictions with --score_only.")
    ranks = RankInfo.from_environment()
    with gloo_process_group(ranks):
        scores = evaluate(
            checkpoint,
            out or (find_checkpoint(checkpoint) if checkpoint.is_file() else checkpoint) / "evaluation",
            geometry,
            batch_size,
            max_new_tokens,
            limit,
            task=task,
            data=data,
            protocols=protocols,
            proposals=proposals,
            root=root,
            vlm=vlm,
            geometry_path=geometry_path,
            ranks=ranks,
        )
    if ranks.rank == 0:
        print(json.dumps(scores, indent=2))
