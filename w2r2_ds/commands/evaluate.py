"""Evaluate a trained model: ``w2r2 evaluate --checkpoint RUN --task scanrefer --geometry fused``.

With several processes (``torchrun --standalone --nproc_per_node 4 launchers/evaluate.py``, or ``deepspeed``) each
process answers a part of the samples. ``--score_only FILE`` scores saved predictions of this or another project without
a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from w2r2_ds.commands.common import command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.config.cli import Parser
from w2r2_ds.utils.logging import stdout_to_stderr

PROTOCOL = (
    "Names of scoring protocols (docs/reference/metrics/), separated by commas, or all; the option may be repeated. "
    "Default: the default protocol of the task."
)
"""Help of ``--protocol``."""


@reports_errors("evaluate")
def main(args: list[str] | None = None) -> None:
    """Run the command; returns the exit code."""
    values = parse(evaluation_parser(), command_words(args))
    given = ",".join(values.pop("protocol") or [])
    with stdout_to_stderr():
        scores = run(**values, protocols=[name.strip() for name in given.split(",") if name.strip()])
    if scores:
        print(json.dumps(scores, indent=2))


def evaluation_parser() -> Parser:
    """Parser of the command line."""
    parser = function_parser(run, "w2r2 evaluate", skip=("protocols",))
    parser.add_argument("--protocol", action="append", metavar="NAME", help=PROTOCOL)
    return parser


def run(
    checkpoint: Path | None = None,
    task: str | None = None,
    data: Path | None = None,
    geometry: Literal["fused", "zero", "shuffle", "no_image"] = "fused",
    protocols: Sequence[str] = (),
    proposals: Path | None = None,
    out: Path | None = None,
    limit: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    root: Path | None = None,
    vlm: str | None = None,
    geometry_path: str | None = None,
    reuse: bool = False,
    score_only: Path | None = None,
    format: Literal["ours", "vgllm", "video3dllm"] = "ours",
    local_rank: int = 0,
) -> dict[str, Any]:
    """Generate greedy answers to a validation set and score them; returns the scores, on rank 0 only.

    Args:
        checkpoint: folder of a run, checkpoint or exported adapter, or RUN/checkpoints/best.
        task: task whose validation sets are evaluated (scanrefer, scan2cap, scanqa, detection or another registered
            task); optional if all sets of the run are of one task.
        data: prepared folder instead of the run's own sets; may be relative to the root.
        geometry: fused; zero for 2D only; shuffle for the geometry of another scene; or no_image for gray frames
            without geometry.
        protocols: names of scoring protocols (docs/reference/metrics/), or all; the task's default if empty.
        proposals: file of detected boxes, for the protocol vgllm_refined.
        out: folder for predictions and scores; default: CHECKPOINT/evaluation.
        limit: number of samples, the first ones; 0 for all.
        batch_size: prompts per forward.
        max_new_tokens: maximum number of tokens of an answer.
        root: data root, if it has moved since training.
        vlm: directory or hub id of the VLM, if it has moved since training.
        geometry_path: directory or hub id of the geometry encoder, if it has moved since training.
        reuse: keep the answers of a finished evaluation of the same weights, data and options.
        score_only: predictions file to score without a model; scores are printed, and written into --out if given.
        format: format of the --score_only file; those of other projects require --data.
        local_rank: set by the deepspeed launcher.
    """
    # Imported here because torch and transformers are slow to import, and --help and wrong options do not need them.
    from w2r2_ds.evaluation.predictions.rescore import score_file
    from w2r2_ds.evaluation.runner import evaluate
    from w2r2_ds.training.checkpoint.manifest import find_checkpoint
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group

    if score_only is not None:
        if checkpoint is not None:
            raise ValueError("--score_only needs no --checkpoint; omit one of the two.")
        return score_file(score_only, format, data, root, task, protocols, proposals, out)
    if checkpoint is None:
        raise ValueError("pass a run, a checkpoint or an adapter with --checkpoint, or predictions with --score_only.")
    ranks = RankInfo.from_environment()
    with gloo_process_group(ranks):
        return evaluate(
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
            reuse=reuse,
        )
