"""Write the weights that the package ships: the VLM with its tokenizer, and the geometry merger, in bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from w2r2_ds.demo.pretraining.pair.run import Pretraining
from w2r2_ds.demo.tiny_models import save_tiny_vlm
from w2r2_ds.models.merger_io import MERGER

VLM = "vlm"
"""Folder of the VLM in the folder of the weights."""


def export_weights(pretraining: Pretraining, out: Path) -> None:
    """Write ``vlm/`` and the merger's file to `out`; the weights in memory become bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    vlm = pretraining.vlm.to(torch.bfloat16)
    vlm.config.dtype = "bfloat16"
    save_tiny_vlm(vlm, pretraining.tokenizer, out / VLM)
    merger = pretraining.merger.to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in merger.state_dict().items()}, out / MERGER)
