"""Inputs of Qwen2.5-VL's vision tower that depend only on the patch grids, computed on the host.

transformers (5.18 and later) accepts them as keyword arguments. By default it computes them on the device, with several
copies to the host per image, each of which waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from w2r2_ds.models.attention.vision import VISION_ATTENTION
from w2r2_ds.types.batch import TowerInputs


@dataclass(frozen=True)
class WindowInputs(TowerInputs):
    """Positions and attention segments of all patches of a batch.

    Attributes:
        positions: ``[patches, 2]`` int64, row and column.
        order: ``[tokens]`` int64 permutation of the merged patches: window by window instead of row by row.
        frames: cumulative number of patches at the frame boundaries, from 0 to ``patches``: the segments of blocks that
            attend within a frame.
        windows: the same at the window boundaries, in the order of `order`: the segments of blocks with window
            attention.
    """

    positions: Tensor
    order: Tensor
    frames: tuple[int, ...]
    windows: tuple[int, ...]

    @classmethod
    def of(cls, grid_thw: Tensor, merge_size: int, window_size: int, patch_size: int) -> WindowInputs:
        """Compute the inputs from ``[images or videos, 3]`` patch grids on the CPU and the sizes of `VisionSpec`."""
        order, windows = get_vision_window_index(grid_thw, merge_size, window_size, patch_size)
        return cls(
            positions=get_vision_position_ids(grid_thw, merge_size),
            order=order,
            frames=tuple(get_vision_cu_seqlens(grid_thw).tolist()),
            windows=tuple(windows.tolist()),
        )

    def arguments(self, config: Any) -> dict[str, Any]:
        """Keyword arguments of the vision tower's forward.

        Args:
            config: configuration of the vision tower.
        """
        # For names with "flash", transformers calls attention once per layer, and would compute the longest segment.
        flash = is_flash_attention_requested(config)
        # The package flash-attn reads the segments on the device. `vision_attention` and the implementations that loop
        # over the segments read them in Python, for which a tensor on the device would have to be copied back.
        on_device = flash and config._attn_implementation != VISION_ATTENTION
        device = self.positions.device if on_device else torch.device("cpu")
        result: dict[str, Any] = {"position_ids": self.positions, "window_index": self.order}
        for name, boundaries in (("seqlen", self.frames), ("window_seqlen", self.windows)):
            result[f"cu_{name}s"] = torch.tensor(boundaries, dtype=torch.int32).to(device, non_blocking=True)
            if flash:
                result[f"max_{name}"] = max(end - begin for begin, end in pairwise(boundaries))
        return result
