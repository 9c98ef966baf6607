"""Rank script of tests/training/fault_tolerance/test_signals.py: trainings in one process, stopped by signals.

``python stopped_runs.py JOBS.json``. A job is [arguments of launchers/train.py, rank, step, signal]: the rank sends
itself the signal in that optimizer step, from 0. Each rank writes exit code and checkpoint per job to JOBS.json.RANK.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from w2r2_ds.commands.train import read_arguments
from w2r2_ds.evaluation.validator import AnswerValidation
from w2r2_ds.training import trainer
from w2r2_ds.training.deepspeed.process_group import init_process_group
from w2r2_ds.training.fault_tolerance.signals import StopSignals
from w2r2_ds.utils.logging import setup_logging


def main(file: Path) -> None:
    """Run all jobs."""
    setup_logging()
    init_process_group()
    real_step, codes = trainer.train_step, []
    for arguments, rank, at, name in json.loads(file.read_text()):

        def train_step(
            run: Any, batches: Any, step: int, rank: int = rank, at: int = at, name: str = name
        ) -> dict[str, float]:
            if dist.get_rank() == rank and step == at:
                os.kill(os.getpid(), signal.Signals[name])
            return real_step(run, batches, step)

        trainer.train_step = train_step  # type: ignore[assignment]
        with StopSignals() as signals:
            outcome = trainer.train(*read_arguments(arguments), AnswerValidation, signals)
        codes.append([outcome.exit_code, str(outcome.checkpoint)])
        gc.collect()
        dist.barrier()
    Path(f"{file}.{dist.get_rank()}").write_text(json.dumps(codes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
