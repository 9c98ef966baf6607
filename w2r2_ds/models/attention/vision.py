"""Attention of a vision tower within windows and frames, in one call per layer.

transformers' vision towers call the attention function once per layer, with the boundaries of all segments, if the name
of the implementation contains "flash". For every other name they loop over the segments in Python: 13,536 SDPA calls
for 24 frames of 504 x 392 pixels in the tower of Qwen2.5-VL.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from w2r2_ds.models.attention.varlen import varlen_attention

VISION_ATTENTION = "flash_varlen"
"""Name of `vision_attention` in the config of a vision tower."""


def use_varlen_attention(vlm: PreTrainedModel) -> None:
    """Switch the vision tower of a VLM from SDPA to `vision_attention`; other implementations stay."""
    if vlm.config.vision_config._attn_implementation != "sdpa":
        return
    # Through the VLM: the tower's own method would try to import a package for a name that contains "flash".
    vlm.set_attn_implementation({"vision_config": VISION_ATTENTION})
    found = vlm.config.vision_config._attn_implementation
    assert found == VISION_ATTENTION, f"transformers left the vision tower's attention at {found}"


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention within segments, with the signature of transformers' attention functions.

    Args:
        query, key, value: ``[1, heads, tokens, head size]``.
        attention_mask: None.
        cu_seq_lens_q: boundaries of the segments, ``[segments + 1]``, from 0 to `tokens`. On the CPU; on a GPU, reading
            it would wait for the device.

    Returns:
        ``[1, tokens, heads, head size]``, and None in place of attention weights.
    """
    assert attention_mask is None and not dropout, "a frozen vision tower has neither a mask nor dropout"
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # [tokens, heads, head size]
    return varlen_attention(q, k, v, lengths, scale=scaling)[None], None


AttentionInterface.register(VISION_ATTENTION, vision_attention)
