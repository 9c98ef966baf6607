"""The composed model: a LoRA-wrapped VLM, a trained geometry merger, and a frozen geometry encoder beside them."""

from __future__ import annotations

import copy
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import nn

from w2r2_ds.geometry.encoder import GeometryEncoder
from w2r2_ds.models.fusion import GeometryMerger, fuse_add, pair_frames


class VisualInputs(Protocol):
    """What `W2R2.encode` reads; `data.collate.Visuals` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def pixel_values(self) -> torch.Tensor: ...
    @property
    def grid_thw(self) -> torch.Tensor: ...
    @property
    def geometry_images(self) -> tuple[torch.Tensor, ...]: ...


def encode_visuals(vlm: Any, visuals: VisualInputs) -> Any:
    """F2D: the output of a VLM's vision tower, whose `pooler_output` is a tuple of ``[tokens, hidden]``."""
    encode = vlm.model.get_video_features if visuals.kind == "video" else vlm.model.get_image_features
    return encode(visuals.pixel_values, visuals.grid_thw, return_dict=True)


def answer_states(vlm: Any, batch: Any, visual: Any) -> torch.Tensor:
    """Last hidden states of a batch's answer rows, ``[rows, hidden]``, from a vision tower's output."""
    states = vlm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        mm_encoder_outputs={batch.visuals.kind: visual},
        use_cache=False,
    ).last_hidden_state
    rows = batch.answer_rows
    return states[rows.sample, rows.position]


class W2R2(nn.Module):
    """One VLM that answers from fused features, Phi(F2D, F3D), or from 2D ones, Phi(F2D, 0).

    The geometry encoder is frozen and no submodule: DeepSpeed neither shards nor saves it.

    Args:
        vlm: a transformers VLM or a PeftModel around one.
        geometry_merger: maps geometry features to the VLM's width.
        geometry: frozen encoder.
        zero: what Phi(F2D, 0) zeroes, ``"merged"`` or ``"features"``.
    """

    def __init__(
        self, vlm: nn.Module, geometry_merger: GeometryMerger, geometry: GeometryEncoder, zero: str = "merged"
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.geometry_merger = geometry_merger
        self.zero = zero
        object.__setattr__(self, "_geometry", geometry)

    @property
    def geometry(self) -> GeometryEncoder:
        """The frozen geometry encoder."""
        return cast(GeometryEncoder, self.__dict__["_geometry"])

    @property
    def base(self) -> Any:
        """The transformers model itself, LoRA layers in place."""
        return self.vlm.get_base_model() if isinstance(self.vlm, PeftModel) else self.vlm

    @torch.no_grad()
    def encode_2d(self, visuals: VisualInputs) -> Any:
        """F2D: the vision tower's output, whose `pooler_output` is a tuple of ``[tokens, hidden]``."""
        return encode_visuals(self.base, visuals)

    @torch.no_grad()
    def encode_3d(self, visuals: VisualInputs) -> list[torch.Tensor]:
        """F3D: per sample ``[frames or pairs of frames, h, w, channels]`` features of the geometry encoder."""
        features = [self.geometry.encode(images) for images in visuals.geometry_images]
        return [pair_frames(f) for f in features] if visuals.kind == "video" else features

    def merge(self, features: list[torch.Tensor]) -> torch.Tensor:
        """``[tokens, hidden]`` merged geometry of all samples, in the order of the visual tokens."""
        return torch.cat([self.geometry_merger(f) for f in features])

    def merge_nothing(self, features: list[torch.Tensor]) -> torch.Tensor | None:
        """The geometry operand of Phi(F2D, 0): None (2D features pass unchanged), or the merger's answer to zeros."""
        if self.zero == "merged":
            return None
        return self.merge([torch.zeros_like(f) for f in features])

    def fuse(self, visual: Any, geometry: torch.Tensor | None) -> Any:
        """Phi: the vision tower's output with `geometry` ``[tokens, hidden]`` added to its tokens."""
        sizes = [len(tokens) for tokens in visual.pooler_output]
        fused = copy.copy(visual)
        fused.pooler_output = torch.split(fuse_add(torch.cat(visual.pooler_output), geometry), sizes)
        return fused

    def hidden(self, batch: Any, visual: Any) -> torch.Tensor:
        """Last hidden states of the answer rows, ``[rows, hidden]``; logits of the prompt are never made."""
        return answer_states(self.base, batch, visual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` -> ``[rows, vocabulary]``."""
        return self.base.lm_head(hidden)
