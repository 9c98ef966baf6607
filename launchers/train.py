"""Train: ``deepspeed launchers/train.py --deepspeed ds_configs/zero3.json [--config RECIPE.yaml] ...``.

Without --config it runs the demo recipe, which makes its own scenes and tiny model where they are missing.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from w2r2_ds.config import RunConfig, config_first, from_tree, train_parser
from w2r2_ds.demo import prepare_demo
from w2r2_ds.engine.deepspeed import join_ranks, load_ds_config
from w2r2_ds.engine.loop import train
from w2r2_ds.evaluation.in_training import InTraining
from w2r2_ds.objective.push import find_reading


def read_arguments(args: list[str]) -> tuple[RunConfig, str]:
    """The run configuration and the DeepSpeed JSON of a command line."""
    options = train_parser("Train a video LLM with W2R2.", args)
    tree = options.parse_args(config_first(args)).as_dict()
    return from_tree(tree), tree["deepspeed"]


def main(args: list[str]) -> None:
    """Join the other ranks, make the demo's data if asked to, train."""
    config, ds_path = read_arguments(args)
    find_reading(config.objective.push)  # this and the next before minutes of demo preparation
    load_ds_config(ds_path)
    join_ranks()
    if config.demo.enabled:
        if dist.get_rank() == 0:
            prepare_demo(config)
        dist.barrier()
    checkpoint = train(config, ds_path, InTraining)
    if dist.get_rank() == 0:
        print(f"checkpoint: {checkpoint}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
