"""Batches with the inputs of attention anchors, attention patterns, and weights that cause a pattern, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.models.w2r2 import W2R2, embed_tokens, insert_visual_tokens

FOCAL = 70.0
TYPICAL = TypicalBox(depth=3.0, size=np.array([1.0, 0.8, 1.5]), class_sizes={17: np.array([1.2, 0.9, 1.6])}, samples=3)
"""The class of `tests/conftest.py`'s target is 17; its box has this size."""


def write_intrinsic(sample: Any, width: int = 80, height: int = 60) -> None:
    """A pinhole camera in the middle of the images, beside the frames of the sample."""
    matrix = np.eye(4)
    matrix[:2, :3] = [[FOCAL, 0, (width - 1) / 2], [0, FOCAL, (height - 1) / 2]]
    np.savetxt(scene_folder(sample.frames[0]) / "intrinsic.txt", matrix)


def anchored(frontend: Any, data_config: Callable[..., Any]) -> Callable[..., Any]:
    """Function `(samples, **data_config_changes)`: the loader's batch with `Batch.anchors`."""

    def make(samples: Sequence[Any], typical: TypicalBox = TYPICAL, **changes: Any) -> Any:
        for sample in samples:
            if sample.frames:
                write_intrinsic(sample)
        config = data_config(**changes)
        processor = make_processor(frontend, config)
        collate = make_collate(frontend, config, typical=typical)
        return collate([processor(sample, True) for sample in samples])

    return make


def attention_at(batch: Any, tokens: Sequence[int]) -> torch.Tensor:
    """``[batch, visual tokens]``: each sample's attention is spread thinly, with most of it on one token."""
    attention = torch.full((len(batch.ids), len(batch.visual_tokens)), 0.01)
    attention[torch.arange(len(tokens)), torch.tensor(tokens)] = 0.6
    return attention


@torch.no_grad()
def put_attention_on(model: W2R2, batch: Any, tokens: Sequence[int]) -> None:
    """Weights with which the 2D-only pass attends to the given visual tokens, one per sample, in the first layer.

    All queries are one constant. The key of a token is this constant times the token's component along a direction in
    which only the given tokens are large. Both are in the two channels with the slowest rotation of M-RoPE, so that the
    distance does not matter. In the other layers, queries are 0: attention is uniform over all tokens before. Without
    tokens, it is so in all layers.
    """
    layers: Any = model.family.language_model(model.base).layers
    visual = model.fuse(model.encode_2d(batch.visuals), None)
    inputs = insert_visual_tokens(batch, embed_tokens(model.base, batch), visual)
    normed = layers[0].input_layernorm(inputs.flatten(0, 1)).double()
    chosen = torch.zeros(len(normed), dtype=torch.float64)
    chosen[batch.visual_tokens[torch.tensor(tokens, dtype=torch.int64)]] = 1.0
    direction = torch.linalg.lstsq(normed, chosen[:, None]).solution[:, 0].float()
    for index, layer in enumerate(layers):
        attention, slowest = layer.self_attn, layer.self_attn.head_dim // 2 - 1
        for projection in (attention.q_proj.base_layer, attention.k_proj.base_layer):
            projection.weight.zero_()
            projection.bias.zero_()
        if index == 0:
            attention.q_proj.base_layer.bias[slowest :: attention.head_dim] = 1000.0
            attention.k_proj.base_layer.weight[slowest :: attention.head_dim] = direction
