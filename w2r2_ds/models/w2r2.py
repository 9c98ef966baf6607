"""The composed model: a LoRA-wrapped VLM, a trained geometry merger and fusion, and a frozen geometry encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed
from w2r2_ds.kernels.select import TORCH_KERNELS, Kernels, implementation
from w2r2_ds.models.family import VlmFamily, find_family
from w2r2_ds.models.fusion import Fusion
from w2r2_ds.models.geometry_encoder import GeometryEncoder
from w2r2_ds.models.merger import GeometryMerger, pair_frames
from w2r2_ds.models.resampling import resample_to_patches
from w2r2_ds.types.batch import Batch, Visuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask = Callable[[Sequence[Tensor]], list[Tensor]]
"""``[tokens, hidden]`` of every image -> the same with some tokens zeroed."""


class W2R2(nn.Module):
    """One VLM that answers from fused tokens, Phi(F2D, F3D), or from the shortcut's tokens (2D only), Phi(F2D, 0).

    The geometry encoder is frozen and not a submodule: DeepSpeed neither shards nor saves it.

    Args:
        vlm: a transformers VLM or a PeftModel around one.
        geometry_merger: maps geometry features to tokens of the VLM's width.
        fusion: Phi.
        geometry: frozen encoder.
        zero_geometry: what Phi(F2D, 0) zeroes, ``"merged"`` tokens or the encoder's ``"features"``.
        kernels: names of the enabled kernels; kernels that replace a module's forward are already installed.
    """

    def __init__(
        self,
        vlm: nn.Module,
        geometry_merger: GeometryMerger,
        fusion: Fusion,
        geometry: GeometryEncoder,
        zero_geometry: str = "merged",
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.geometry_merger = geometry_merger
        self.fusion = fusion
        self.family = find_family(self.base.config.model_type)
        self.zero_geometry = zero_geometry
        self.kernels = kernels
        self.fingerprint: dict[str, Any] = {}  # see `models.build.fingerprint`; of a model built from a configuration
        # nn.Module.__setattr__ would register an encoder that is a module; ZeRO-3 would then shard and save it.
        object.__setattr__(self, "_geometry", geometry)

    @property
    def geometry(self) -> GeometryEncoder:
        """The frozen geometry encoder."""
        return cast(GeometryEncoder, self.__dict__["_geometry"])

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model itself, with LoRA layers in place."""
        return self.vlm.get_base_model() if isinstance(self.vlm, PeftModel) else self.vlm

    def geometry_modules(self) -> dict[str, nn.Module]:
        """Modules that train besides LoRA, in an optimizer group of their own; the fusion `add` has no parameters."""
        return {"geometry_merger": self.geometry_merger, "fusion": self.fusion}

    @torch.no_grad()
    def encode_2d(self, visuals: Visuals, min_calls: int = 0) -> VisionOutput:
        """F2D of a batch, without gradient: from the feature cache where it has them, else from the vision tower.

        With a cache of 2D features the tower is called once per frame set, so that a cached value never depends on
        the rest of the batch.

        Args:
            visuals: visual inputs of a batch.
            min_calls: minimum number of vision tower forwards; the rest run on the dummy image. Under ZeRO-3 all ranks
                must call the tower equally often, because each call gathers its weights.
        """
        if not visuals.cached_2d:
            assert visuals.dummy or not min_calls, "`min_calls` requires cached 2D features"
            output, made = self.family.encode_visuals(self.base, visuals), 1
        else:
            features, made = [], 0
            for cached, inputs in zip(visuals.cached_2d, visuals.uncached, strict=True):
                if cached.features is None:
                    assert inputs is not None, "the collator keeps the patches of uncached samples"
                    features.append(self.family.to_cache(self.family.encode_visuals(self.base, inputs)))
                    cached.write_async(features[-1])
                    made += 1
                else:
                    features.append(cached.features)
            output = self.family.from_cache(torch.cat(features), visuals.sizes)
        # Calls without use of their output, so that this rank gathers the tower's weights as often as the others.
        for _ in range(min_calls - made):
            self.family.encode_visuals(self.base, visuals.filler or visuals)
        return output

    @torch.no_grad()
    def encode_3d(self, visuals: Visuals) -> list[Tensor]:
        """F3D: per frame set ``[frames or pairs of frames, h, w, channels]`` features, from cache or encoder.

        ``h x w`` is at least the vision tower's patch grid; the merger crops what exceeds it. Cached features
        keep the encoder's own grid.
        """
        features = []
        cached_3d = visuals.cached_3d or (None,) * len(visuals.geometry_images)
        # One call per frame set: the encoder attends over the frames of one scene, never over those of several.
        for cached, images in zip(cached_3d, visuals.geometry_images, strict=True):
            if cached is not None and cached.features is not None:
                features.append(cached.features)
                continue
            assert images is not None, "the collator keeps the images of uncached samples"
            features.append(self.geometry.encode(images))
            if cached is not None:
                cached.write_async(features[-1])
        # A row of a video's visual tokens covers two frames, a geometry feature one.
        if visuals.kind == "video":
            features = [pair_frames(f) for f in features]
        tower, own = self.family.tower_sizes(self.base.config), self.geometry.spec.patch_size
        return [resample_to_patches(f, own, tower.patch_size, tower.merge_size) for f in features]

    def merge(self, features: list[Tensor]) -> Tensor:
        """``[tokens, hidden]`` merged geometry of all frame sets, in the order of the visual tokens."""
        merged: Tensor = self.geometry_merger(features)
        return merged

    def zero_geometry_tokens(self, features: list[Tensor]) -> Tensor | None:
        """The geometry operand of Phi(F2D, 0), by `model.zero_geometry`.

        ``merged``: returns None, and the fusion uses zeros. ``features``: the merger's output for zero features, which
        its biases make non-zero.
        """
        if self.zero_geometry == "merged":
            return None
        return self.merge([torch.zeros_like(f) for f in features])

    def fuse(self, visual: VisionOutput, geometry: Tensor | None, mask: Mask | None = None) -> VisionOutput:
        """Apply Phi; returns a copy of `visual` with fused tokens.

        Args:
            visual: result of `encode_2d`.
            geometry: ``[tokens, hidden]``, result of `merge`, or of `zero_geometry_tokens` for the shortcut.
            mask: applied to the 2D tokens first, in the fused pass in training only (`token_masking.py`).
        """
        assert mask is None or geometry is not None, "the shortcut is never masked"
        images = list(visual.pooler_output) if mask is None else mask(visual.pooler_output)
        sizes = [len(tokens) for tokens in images]
        # A shallow copy keeps every other field of the output, such as visual features of single layers.
        fused = copy.copy(visual)
        # The fusion is called on every rank, also for a dummy: ZeRO-3 needs the same order of modules everywhere.
        fused.pooler_output = torch.split(self.fusion(torch.cat(images), geometry, sizes), sizes)
        return fused

    def input_streams(self, batch: Batch, shortcut: VisionOutput, fused: VisionOutput) -> tuple[Tensor, Tensor]:
        """Input embeddings of the shortcut and of the fused stream, ``[sequences, length, hidden]``, in one pass.

        `shortcut` and `fused` come from `fuse`. The implementation depends on `model.kernels` only, so it is the same
        for every batch.

        Args:
            batch: token ids, and the positions of visual tokens; a dummy has none.
            shortcut: Phi(F2D, 0); receives no gradient.
            fused: Phi(F2D, F3D).
        """
        embeddings = embed_tokens(self.base, batch)
        if batch.visuals.dummy:
            return embeddings.detach(), embeddings
        # The shortcut pass has no gradient; without detach the fusion would get one through Phi(F2D, 0).
        operands = torch.cat(shortcut.pooler_output).detach(), torch.cat(fused.pooler_output)
        kernels = implementation(self.kernels, "dual_stream_embed")
        return dual_stream_embed(embeddings, batch.visual_tokens, *operands, kernels)

    def answer_hidden_states(self, batch: Batch, visual: VisionOutput, include_description: bool = False) -> Tensor:
        """Last hidden states ``[answer tokens, hidden]``; logits of the prompt are never computed."""
        inputs = insert_visual_tokens(batch, embed_tokens(self.base, batch), visual)
        return self.row_states(batch, inputs, visual, include_description, nullcontext())

    def row_states(
        self,
        batch: Batch,
        inputs: Tensor,
        visual: VisionOutput,
        include_description: bool,
        context: AbstractContextManager[object],
    ) -> Tensor:
        """`VlmFamily.row_states` of the answer tokens; `include_description` appends those of the description's tokens.

        `context` is entered around the decoder's forward (lockstep order).
        """
        return self.family.row_states(
            self.base, batch, inputs, visual, *answer_rows(batch, include_description), context
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> ``[tokens, vocabulary]``."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        return logits


def num_tower_calls(visuals: Visuals) -> int:
    """Vision tower forwards that the batch needs, without dummy calls."""
    return sum(cached.features is None for cached in visuals.cached_2d) if visuals.cached_2d else 1


def embed_tokens(vlm: PreTrainedModel, batch: Batch) -> Tensor:
    """``[sequences, length, hidden]`` embeddings of the token ids, with placeholders at the visual tokens."""
    embeddings: Tensor = vlm.get_input_embeddings()(batch.input_ids)
    return embeddings


def insert_visual_tokens(batch: Batch, embeddings: Tensor, visual: VisionOutput) -> Tensor:
    """The embeddings with a vision tower's output at the visual tokens; unchanged for a dummy."""
    if batch.visuals.dummy:
        return embeddings
    tokens, positions = torch.cat(visual.pooler_output), batch.visual_tokens
    assert len(tokens) == len(positions), f"{len(tokens)} visual tokens, but {len(positions)} positions for them"
    # The collator has computed the positions. The stock forward would search for placeholders and copy their number to
    # the host, which waits for the device.
    return embeddings.flatten(0, 1).index_copy(0, positions, tokens.to(embeddings.dtype)).view_as(embeddings)


def answer_rows(batch: Batch, include_description: bool = False) -> tuple[Tensor, Tensor]:
    """Sequence and position of the answer tokens, int64 ``[answer tokens]`` each; optionally the description's too."""
    rows = batch.answer_positions
    if not include_description:
        return rows.sequence, rows.position
    what = batch.description_positions
    return torch.cat([rows.sequence, what.sequence]), torch.cat([rows.position, what.position])


def answer_states(family: VlmFamily, vlm: PreTrainedModel, batch: Batch, visual: VisionOutput) -> Tensor:
    """Last hidden states ``[answer tokens, hidden]`` of a batch, for a VLM outside a `W2R2`."""
    inputs = insert_visual_tokens(batch, embed_tokens(vlm, batch), visual)
    return family.row_states(vlm, batch, inputs, visual, *answer_rows(batch), nullcontext())
