"""Pretrain the demo's pair: ``python -m w2r2_ds.demo.pretraining --work FOLDER --out FOLDER``."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from w2r2_ds.demo.pretraining.pair.card import write_card
from w2r2_ds.demo.pretraining.pair.encoders import VGGT_WEIGHTS, geometry_config
from w2r2_ds.demo.pretraining.pair.evaluate import evaluate
from w2r2_ds.demo.pretraining.pair.export import export_weights
from w2r2_ds.demo.pretraining.pair.rooms.tasks import Task
from w2r2_ds.demo.pretraining.pair.run import round_to_bfloat16, run_stages
from w2r2_ds.demo.pretraining.pair.settings import SETTINGS
from w2r2_ds.types.geometry import DemoGeometry


def main(args: list[str] | None = None) -> None:
    """Run all stages, evaluate the rounded weights, and write them with their card."""
    parser = argparse.ArgumentParser(prog="python -m w2r2_ds.demo.pretraining", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of rooms and results of stages; continued")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and the card")
    parser.add_argument(
        "--geometry", choices=get_args(DemoGeometry), default="point_map", help="geometry encoder of the pair"
    )
    parser.add_argument("--vggt", type=Path, default=VGGT_WEIGHTS, help="folder of the VGGT, with --geometry vggt")
    parser.add_argument("--seed", type=int, default=0, help="seed of rooms, weights and draws")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args(args)
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    settings = replace(SETTINGS[options.geometry], seed=options.seed)
    geometry = geometry_config(options.geometry, options.vggt)
    pretraining, records = run_stages(options.work, settings, geometry)
    for module in (pretraining.vlm, pretraining.merger):
        round_to_bfloat16(module)
    val, tasks = pretraining.data("val"), get_args(Task)
    scores: dict[str, Any] = {task: evaluate(pretraining.pair, val, task, 10**6) for task in tasks}
    export_weights(pretraining, options.out)
    write_card(options.out, settings, geometry, records, scores, pretraining.tokenizer)


if __name__ == "__main__":
    main()
