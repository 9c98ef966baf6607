"""Collect visual tokens of a data set: 2D, geometry and fused ones, and their hidden states in both passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch


@dataclass(frozen=True)
class TokenFeatures:
    """Features of the same visual tokens at several places of the model.

    Attributes:
        samples: id of the sample of every token.
        two_d: ``[tokens, hidden]`` float32, F2D, from the vision tower.
        three_d: ``[tokens, hidden]`` float32, the merged geometry.
        fused: ``[tokens, hidden]`` float32, Phi(F2D, F3D).
        layers: per decoder layer, its input in the 2D-only pass and in the fused pass, ``[tokens, hidden]`` float32
            each. That of the first layer is Phi(F2D, 0) and Phi(F2D, F3D).
    """

    samples: tuple[str, ...]
    two_d: np.ndarray
    three_d: np.ndarray
    fused: np.ndarray
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]


@torch.no_grad()
def collect_tokens(model: W2R2, batches: Iterable[Batch], per_frame_set: int, seed: int) -> TokenFeatures:
    """Features of at most `per_frame_set` random visual tokens of every frame set.

    The hidden states are those of the layers' inputs. The output of the last layer is not computed for visual tokens.

    Args:
        model: trained model in evaluation mode.
        batches: batches with answers, with at least one frame set each, on any device.
        per_frame_set: number of tokens per frame set.
        seed: seed of the selection, which does not depend on the batch size.
    """
    found: list[tuple[list[str], list[np.ndarray]]] = []
    count = 0
    for batch in batches:
        index = _choose(batch, per_frame_set, seed, count)
        count += len(batch.visuals.geometry_frames)
        owners = batch.frame_set_of_token[index].tolist()
        found.append(([batch.visuals.ids[owner] for owner in owners], _features(model, batch, index)))
    samples = tuple(name for names, _ in found for name in names)
    columns = [np.concatenate(parts) for parts in zip(*(features for _, features in found), strict=True)]
    two_d, three_d, fused, *states = columns
    half = len(states) // 2
    return TokenFeatures(samples, two_d, three_d, fused, tuple(zip(states[:half], states[half:], strict=True)))


def _choose(batch: Batch, per_frame_set: int, seed: int, first: int) -> Tensor:
    """Indices of the chosen visual tokens of a batch, ascending; `first` counts the frame sets of batches before."""
    owner, chosen = batch.frame_set_of_token.cpu().numpy(), []
    for frame_set in range(len(batch.visuals.geometry_frames)):
        tokens = np.flatnonzero(owner == frame_set)
        random = np.random.default_rng([seed, first + frame_set])
        chosen.append(np.sort(random.permutation(tokens)[:per_frame_set]))
    return torch.from_numpy(np.concatenate(chosen))


def _features(model: W2R2, batch: Batch, index: Tensor) -> list[np.ndarray]:
    """F2D, merged geometry, fused tokens; the inputs of the layers in the 2D-only pass; those in the fused pass."""
    device = model.base.device
    batch, index = batch.to(device), index.to(device)
    visual, geometry = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)
    merged = model.merge(geometry)
    fused = model.fuse(visual, merged)
    features = [_rows(tokens, index) for tokens in (torch.cat(visual.pooler_output), merged)]
    features.append(_rows(torch.cat(fused.pooler_output), index))
    position = batch.visual_tokens[index]

    def record(_: int, layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        features.append(_rows(hidden.flatten(0, 1), position))

    for tokens in (model.fuse(visual, model.zero_geometry_tokens(geometry)), fused):
        model.answer_hidden_states(batch, tokens, on_input=record)
    return features


def _rows(tokens: Tensor, index: Tensor) -> np.ndarray:
    return tokens.index_select(0, index).float().cpu().numpy()
