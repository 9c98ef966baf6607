"""Train: ``deepspeed launchers/train.py --deepspeed ds_configs/zero3.json [--config RECIPE.yaml] ...``.

Without --config it runs the demo recipe, which makes its own scenes and tiny model where they are missing.
"""

from __future__ import annotations

import sys
import traceback

import torch.distributed as dist

from w2r2_ds.config.io import config_first, from_tree, train_parser
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.demo.assets import prepare_demo
from w2r2_ds.evaluation.validator import InTraining
from w2r2_ds.objective.push_terms import find_push_term
from w2r2_ds.training.deepspeed.config import load_ds_config
from w2r2_ds.training.deepspeed.launch import join_ranks
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, LOST, Unreachable
from w2r2_ds.training.fault_tolerance.signals import StopSignals
from w2r2_ds.training.fault_tolerance.watchdog import MISTAKES
from w2r2_ds.training.trainer import train
from w2r2_ds.utils.logging import ignore_write_errors, setup_logging
from w2r2_ds.utils.sanitize import message


def read_arguments(args: list[str]) -> tuple[RunConfig, str]:
    """The run configuration and the DeepSpeed JSON of a command line."""
    options = train_parser("Train a video LLM with W2R2.", args)
    tree = options.parse_args(config_first(args)).as_dict()
    return from_tree(tree), tree["deepspeed"]


def main(args: list[str], signals: StopSignals) -> int:
    """Join the other ranks, make the demo's data if asked to, train; returns an exit code of
    training/fault_tolerance/exit_codes.py."""
    config, ds_path = read_arguments(args)
    find_push_term(config.objective.push)  # this and the next before minutes of demo preparation
    load_ds_config(ds_path)
    join_ranks(config.train.hang_seconds)
    if config.demo.enabled:
        if dist.get_rank() == 0:
            prepare_demo(config)
        dist.barrier()
    outcome = train(config, ds_path, InTraining, signals)
    if dist.get_rank() == 0:
        print(f"checkpoint: {outcome.checkpoint}" if outcome.checkpoint else "no checkpoint was written", flush=True)
        if outcome.code != DONE:
            print(f"stopped by a signal; --resume auto goes on (exit code {outcome.code})", flush=True)
    dist.barrier()  # so that no rank is gone, and nobody looks for it, while another one still writes
    dist.destroy_process_group()
    return outcome.code


if __name__ == "__main__":
    ignore_write_errors()
    try:
        setup_logging()
        with StopSignals() as stop_signals:
            sys.exit(main(sys.argv[1:], stop_signals))
    except MISTAKES as error:
        sys.exit(f"train.py: {message(error)}")
    except Unreachable as error:
        print(f"train.py: {message(error)}", file=sys.stderr)
        sys.exit(LOST)
    except Exception:
        traceback.print_exc()
        sys.exit(LOST)
