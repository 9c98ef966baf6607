"""Evaluate: ``python launchers/evaluate.py --checkpoint RUN --task scanrefer --geometry fused``.

Several processes share the work: ``torchrun --standalone --nproc_per_node 4 launchers/evaluate.py``, or ``deepspeed``.
``--score_only FILE`` scores predictions again, or those of another project, without a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from w2r2_ds.config.cli import Parser
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.evaluation.runner import evaluate
from w2r2_ds.training.checkpoint.manifest import find_checkpoint
from w2r2_ds.utils.distributed import RankInfo, gloo_process_group
from w2r2_ds.utils.logging import setup_logging
from w2r2_ds.utils.sanitize import message


def main(
    checkpoint: Path | None = None,
    task: Literal["scanrefer", "scan2cap", "scanqa", "detection"] | None = None,
    data: Path | None = None,
    geometry: Literal["fused", "zero", "shuffle"] = "fused",
    protocol: str = "",
    proposals: Path | None = None,
    out: Path | None = None,
    limit: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    root: Path | None = None,
    vlm: str | None = None,
    vggt: str | None = None,
    score_only: Path | None = None,
    format: Literal["ours", "vgllm", "video3dllm"] = "ours",
    local_rank: int = 0,
) -> None:
    """Answer a validation set greedily and score it.

    Args:
        checkpoint: run, checkpoint, RUN/checkpoints/best or exported adapter.
        task: which of the run's validation sets; may be left out where all are of one task.
        data: a prepared folder instead of the run's own, as it is or below the root.
        geometry: fused, zero for the 2D-only pass, or shuffle for another scene's geometry.
        protocol: how to score (docs/metrics.md): a name, several with commas between or the option given several times,
            or all; the task's default without it.
        proposals: file of detected boxes, for the protocol vgllm_refined.
        out: folder for predictions and scores; CHECKPOINT/evaluation without it.
        limit: number of samples, 0 for all.
        batch_size: prompts per forward.
        max_new_tokens: longest answer.
        root: folder of the data, if not where it was in training.
        vlm: directory or hub id of the video LLM, if not where it was in training.
        vggt: directory or hub id of VGGT, if not where it was in training.
        score_only: predictions to score without a model; scores are printed, and written into --out if it is given.
        format: who wrote them; for other projects' --data says what they are predictions of.
        local_rank: set by the deepspeed launcher.
    """
    protocols = [name.strip() for name in protocol.split(",") if name.strip()]
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
            vggt=vggt,
            ranks=ranks,
        )
    if ranks.rank == 0:
        print(json.dumps(scores, indent=2))


def gather_protocols(args: list[str]) -> list[str]:
    """The same command line with every ``--protocol`` in one: jsonargparse would keep the last alone.

    Options may be written with hyphens inside, ``--score-only``.
    """
    rest: list[str] = []
    names: list[str] = []
    words = iter(_underscored(word) for word in args)
    for word in words:
        if word == "--protocol":
            names += [value for value in [next(words, None)] if value is not None]
        elif word.startswith("--protocol="):
            names.append(word.partition("=")[2])
        else:
            rest.append(word)
    return [*rest, *(["--protocol", ",".join(names)] if names else [])]


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


if __name__ == "__main__":
    try:
        setup_logging()
        auto_cli(main, args=gather_protocols(sys.argv[1:]), as_positional=False, parser_class=Parser)
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        sys.exit(f"evaluate.py: {message(error)}")
