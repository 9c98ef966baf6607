"""Selected tokens of a batch, such as its answer tokens, and the tokens that each of them attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from w2r2_ds.types.batch import Layout

ROW_MULTIPLE = 32
"""The queries of the attention are padded with zeros to a multiple of this number.

Every micro-batch selects another number of tokens, usually 30 to 100 per sample. Together with
`data.loader.LENGTH_MULTIPLE`, rounding leaves few shapes of the attention, whose memory PyTorch's caching allocator
reuses. It costs 16 queries of attention on average; the linear layers have no more rows.
"""

BLOCK_ROWS = 64
"""Most selected tokens whose attention weights exist at a time, in float32 for all heads."""


@dataclass(frozen=True)
class SelectedTokens:
    """Selected tokens of a batch, such as its answer tokens, and their attention mask.

    Attributes:
        index: ``[selected]`` int64 index into the flattened tokens, sequence * length + position.
        mask: ``[1, 1, rows, sequences * length]`` bool; True where a selected token attends to a token. The number of
            rows is that of selected tokens, rounded up to a multiple of `ROW_MULTIPLE`; further rows are True.
    """

    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, layout: Layout, sequence: Tensor, position: Tensor) -> SelectedTokens:
        """Select tokens by their ``[selected]`` int64 `sequence` and `position` in sequences of this layout."""
        sequences, length = layout.group.shape
        index = sequence * length + position
        # The mask covers the tokens of all sequences, although a token attends only to its own one. Gathering the keys
        # per sequence would need sizes on the host, which waits for the device; and few tokens are selected.
        token = torch.arange(sequences * length, device=index.device)
        group, suffix = layout.group.flatten(), layout.suffix.flatten()
        # The rule of `Layout`: same sequence and group, in the prefix or in the own suffix, and not a later token.
        same_group = (token // length == sequence[:, None]) & (group == group[index][:, None])
        shared = (suffix == 0) | (suffix == suffix[index][:, None])
        mask = same_group & shared & (token <= index[:, None])
        # True, because the softmax of a row without keys is NaN.
        return cls(index, pad(mask, (0, 0, 0, -len(index) % ROW_MULTIPLE), value=True)[None, None])
