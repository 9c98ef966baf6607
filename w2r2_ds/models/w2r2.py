"""The composed model: a LoRA-wrapped VLM, a trained geometry merger, and a frozen geometry encoder beside them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import nn

from w2r2_ds.features.lookup import Cached
from w2r2_ds.kernels.select import Kernels
from w2r2_ds.models.emit import LateSum
from w2r2_ds.models.encode import encode_cached, encode_geometry
from w2r2_ds.models.fusion import Add, Fusion
from w2r2_ds.models.geometry_encoder import GeometryEncoder
from w2r2_ds.models.merger import GeometryMerger, pair_frames
from w2r2_ds.models.qwen2_5_vl.last_layer import Rows, rows_only
from w2r2_ds.models.qwen2_5_vl.packed_attention import attention_inputs
from w2r2_ds.types.batch import TowerInputs

Mask = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""``[tokens, hidden]`` of every image -> the same with some tokens zeroed."""


class VisualInputs(Protocol):
    """What `W2R2.encode` reads; `data.collate.Visuals` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def pixel_values(self) -> torch.Tensor: ...
    @property
    def grid_thw(self) -> torch.Tensor: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def tower(self) -> TowerInputs: ...
    @property
    def geometry_images(self) -> tuple[torch.Tensor | None, ...]: ...
    @property
    def dummy(self) -> bool: ...
    @property
    def cached_3d(self) -> tuple[Cached, ...]: ...
    @property
    def cached_2d(self) -> tuple[Cached, ...]: ...
    @property
    def alone(self) -> tuple[VisualInputs | None, ...]: ...
    @property
    def spare(self) -> VisualInputs | None: ...


def encode_visuals(vlm: Any, visuals: VisualInputs) -> Any:
    """F2D: a vision tower's output; its `pooler_output` has ``[tokens, hidden]`` for every image or pair of frames.

    The tower itself is called: `get_image_features` would read the grid off the device to split the tokens.
    """
    tower = vlm.model.visual
    given = visuals.tower.arguments(tower.config)
    output = tower(visuals.pixel_values.type(tower.dtype), grid_thw=visuals.grid_thw, return_dict=True, **given)
    output.pooler_output = torch.split(output.pooler_output, list(visuals.sizes))
    return output


def embed(vlm: Any, batch: Any) -> torch.Tensor:
    """``[sequences, length, hidden]`` embeddings of the tokens, visual ones meaning nothing yet."""
    embeddings: torch.Tensor = vlm.get_input_embeddings()(batch.input_ids)
    return embeddings


def place(batch: Any, embeddings: torch.Tensor, visual: Any) -> torch.Tensor:
    """The same with a vision tower's output at the visual tokens; a dummy's goes nowhere.

    The stock forward would search for the places and read on the host how many it found.
    """
    if batch.visuals.dummy:
        return embeddings
    tokens, places = torch.cat(visual.pooler_output), batch.visual_tokens
    assert len(tokens) == len(places), f"{len(tokens)} visual tokens, but {len(places)} places for them"
    return embeddings.flatten(0, 1).index_copy(0, places, tokens.to(embeddings.dtype)).view_as(embeddings)


def row_states(
    vlm: Any,
    batch: Any,
    inputs: torch.Tensor,
    with_what: bool = False,
    around: AbstractContextManager[object] | None = None,
) -> torch.Tensor:
    """Last hidden states of a batch's answer rows, ``[rows, hidden]``, from ``[sequences, length, hidden]`` inputs.

    `with_what` appends those of the *what* positions (the description in the prompt); `around` is entered for the
    length of the stock loop over the layers, of which the last one knows the rows only.
    """
    rows = batch.answer_rows
    sequence, position = rows.sequence, rows.position
    if with_what:
        sequence = torch.cat([sequence, batch.what_rows.sequence])
        position = torch.cat([position, batch.what_rows.position])
    text = vlm.model.language_model
    with rows_only(text.layers[-1], Rows.of(batch.layout, sequence, position)), around or nullcontext():
        states: torch.Tensor = text(
            inputs_embeds=inputs, position_ids=batch.position_ids, use_cache=False, **attention_inputs(vlm, batch)
        ).last_hidden_state
    return states


def answer_states(vlm: Any, batch: Any, visual: Any, with_what: bool = False) -> torch.Tensor:
    """`row_states` from a vision tower's output."""
    return row_states(vlm, batch, place(batch, embed(vlm, batch), visual), with_what)


class W2R2(nn.Module):
    """One VLM that answers from fused features, Phi(F2D, F3D), or from 2D ones, Phi(F2D, 0).

    The geometry encoder is frozen and no submodule: DeepSpeed neither shards nor saves it.

    Args:
        vlm: a transformers VLM or a PeftModel around one.
        geometry_merger: maps geometry features to the VLM's width.
        fusion: Phi.
        geometry: frozen encoder.
        zero_geometry: what Phi(F2D, 0) zeroes, ``"merged"`` or ``"features"``.
        kernels: how the streams' inputs are written; the modules are bound already.
    """

    def __init__(
        self,
        vlm: nn.Module,
        geometry_merger: GeometryMerger,
        fusion: Fusion,
        geometry: GeometryEncoder,
        zero_geometry: str = "merged",
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.geometry_merger = geometry_merger
        self.fusion = fusion
        self.zero_geometry = zero_geometry
        self.kernels = kernels
        self.weights: dict[str, str] = {}  # which frozen weights it stands on, where they came from files
        object.__setattr__(self, "_geometry", geometry)

    @property
    def geometry(self) -> GeometryEncoder:
        """The frozen geometry encoder."""
        return cast(GeometryEncoder, self.__dict__["_geometry"])

    @property
    def base(self) -> Any:
        """The transformers model itself, LoRA layers in place."""
        return self.vlm.get_base_model() if isinstance(self.vlm, PeftModel) else self.vlm

    def geometry_modules(self) -> dict[str, nn.Module]:
        """What trains beside LoRA, in an optimizer group of its own: the merger, and the fusion, which may be empty."""
        return {"geometry_merger": self.geometry_merger, "fusion": self.fusion}

    @torch.no_grad()
    def encode_2d(self, visuals: VisualInputs, calls: int = 0) -> Any:
        """F2D, as `encode_visuals` gives it, without a gradient, or as the cache has it.

        Args:
            visuals: of a batch.
            calls: how often the vision tower is called at least, with the dummy where it need not be: under ZeRO-3 as
                often as on every other rank.
        """
        return encode_cached(functools.partial(encode_visuals, self.base), visuals, calls)

    @torch.no_grad()
    def encode_3d(self, visuals: VisualInputs) -> list[torch.Tensor]:
        """F3D: per sample ``[frames or pairs of frames, h, w, channels]`` features of the geometry encoder."""
        features = encode_geometry(self.geometry, visuals)
        return [pair_frames(f) for f in features] if visuals.kind == "video" else features

    def merge(self, features: list[torch.Tensor]) -> torch.Tensor:
        """``[tokens, hidden]`` merged geometry of all samples, in the order of the visual tokens, by one call."""
        merged: torch.Tensor = self.geometry_merger(features)
        return merged

    def merge_nothing(self, features: list[torch.Tensor]) -> torch.Tensor | None:
        """The geometry operand of Phi(F2D, 0): None (2D features pass unchanged), or the merger's answer to zeros."""
        if self.zero_geometry == "merged":
            return None
        return self.merge([torch.zeros_like(f) for f in features])

    def fuse(self, visual: Any, geometry: torch.Tensor | None, mask: Mask | None = None) -> Any:
        """Phi, as a vision tower's output that the VLM takes; `visual` stays as it is.

        Args:
            visual: of `encode_2d`.
            geometry: ``[tokens, hidden]`` of `merge`, or what `merge_nothing` says for the shortcut.
            mask: what is done to the 2D tokens of the images first, for the fused pass in training only
            (`visual_mask_ratio.py`).
        """
        assert mask is None or geometry is not None, "the shortcut is never masked"
        images = list(visual.pooler_output) if mask is None else mask(visual.pooler_output)
        sizes = [len(tokens) for tokens in images]
        if self.kernels == "triton" and type(self.fusion) is Add and geometry is not None and mask is None:
            return LateSum(visual, geometry)
        fused = copy.copy(visual)
        fused.pooler_output = torch.split(self.fusion(torch.cat(images), geometry, sizes), sizes)
        return fused

    def hidden(self, batch: Any, visual: Any, with_what: bool = False) -> torch.Tensor:
        """Last hidden states of the answer rows, ``[rows, hidden]``; logits of the prompt are never made."""
        return answer_states(self.base, batch, visual, with_what)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` -> ``[rows, vocabulary]``."""
        return self.base.lm_head(hidden)
