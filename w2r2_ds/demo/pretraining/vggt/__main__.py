"""Train the tiny VGGT: ``python -m w2r2_ds.demo.pretraining.vggt --out FOLDER``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from w2r2_ds.demo.pretraining.record import StageRecord
from w2r2_ds.demo.pretraining.vggt.card import write_card
from w2r2_ds.demo.pretraining.vggt.room_views import RoomViews
from w2r2_ds.demo.pretraining.vggt.scenes import VGGTSettings
from w2r2_ds.demo.pretraining.vggt.train import VGGTTrainer
from w2r2_ds.models.vggt.loading import save_vggt


def main(args: list[str] | None = None) -> None:
    """Train, and write ``config.json``, ``model.safetensors`` (bfloat16) and the card of these weights."""
    parser = argparse.ArgumentParser(prog="python -m w2r2_ds.demo.pretraining.vggt", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and the card")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args(args)
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    settings = VGGTSettings()
    trainer, record = VGGTTrainer(settings, RoomViews(settings.seed, "train")), StageRecord("vggt", every=50)
    record.run(trainer.step, settings.steps)
    save_vggt(trainer.vggt.to(torch.bfloat16), options.out)
    write_card(options.out, settings, record.as_json())


if __name__ == "__main__":
    main()
