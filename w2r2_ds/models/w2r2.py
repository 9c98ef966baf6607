"""The composed model: a LoRA-wrapped VLM, a trained geometry merger and fusion, and a frozen geometry encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

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
    """One VLM that answers from fused tokens, Phi(F2D, F3D), or from visual-only tokens, Phi(F2D, 0).

    The geometry encoder is frozen and not a submodule: DeepSpeed neither shards nor saves it.

    Args:
        vlm: a transformers VLM or a PeftModel around one.
        geometry_merger: maps geometry features to tokens of the VLM's width.
        fusion: Phi.
        geometry: frozen encoder.
        zero_geometry: what Phi(F2D, 0) zeroes, ``"merged"`` tokens or the encoder's ``"features"``.
        kernels: names of the kernels in use; those of modules are bound already.
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
        self.weights: dict[str, str] = {}  # hashes of the frozen weights, where they were read from files
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
        """Modules that train besides LoRA, in an optimizer group of their own; `add` has no parameters."""
        return {"geometry_merger": self.geometry_merger, "fusion": self.fusion}

    @torch.no_grad()
    def encode_2d(self, visuals: Visuals, calls: int = 0) -> VisionOutput:
        """F2D of a batch, without gradient: from the feature cache where it has them, else from the vision tower.

        With a cache of 2D features the tower is called once per set of frames, so that a cached value never depends on
        the rest of the batch.

        Args:
            visuals: of a batch.
            calls: least number of calls of the tower. Under ZeRO-3 all ranks must call it equally often, because each
                call gathers its weights; missing calls are made on the dummy image.
        """
        if not visuals.cached_2d:
            assert visuals.dummy or not calls, "ranks agree on a number of calls only where 2D features are cached"
            output, made = self.family.encode_visuals(self.base, visuals), 1
        else:
            features, made = [], 0
            for cached, inputs in zip(visuals.cached_2d, visuals.uncached, strict=True):
                if cached.features is None:
                    assert inputs is not None, "the collator keeps the patches of what the cache lacks"
                    features.append(self.family.to_cache(self.family.encode_visuals(self.base, inputs)))
                    cached.keep(features[-1])
                    made += 1
                else:
                    features.append(cached.features)
            output = self.family.from_cache(torch.cat(features), visuals.sizes)
        # Calls without use of their output, so that this rank gathers the tower's weights as often as the others.
        for _ in range(calls - made):
            self.family.encode_visuals(self.base, visuals.filler or visuals)
        return output

    @torch.no_grad()
    def encode_3d(self, visuals: Visuals) -> list[Tensor]:
        """F3D: per set of frames ``[frames or pairs of frames, h, w, channels]`` features, from cache or encoder.

        ``h x w`` is at least the vision tower's patch grid; the merger crops what exceeds it. The cache has the
        encoder's own grid.
        """
        features = []
        cached_3d = visuals.cached_3d or (None,) * len(visuals.geometry_images)
        # One call per set of frames: the encoder attends over the frames of one scene, never over those of several.
        for cached, images in zip(cached_3d, visuals.geometry_images, strict=True):
            if cached is not None and cached.features is not None:
                features.append(cached.features)
                continue
            assert images is not None, "the collator keeps the images of what the cache lacks"
            features.append(self.geometry.encode(images))
            if cached is not None:
                cached.keep(features[-1])
        # A row of a video's visual tokens covers two frames, a geometry feature one.
        if visuals.kind == "video":
            features = [pair_frames(f) for f in features]
        tower, merge_size = self.base.config.vision_config, self.geometry_merger.merge_size
        return [resample_to_patches(f, self.geometry.spec.patch_size, tower.patch_size, merge_size) for f in features]

    def merge(self, features: list[Tensor]) -> Tensor:
        """``[tokens, hidden]`` merged geometry of all sets of frames, in the order of the visual tokens."""
        merged: Tensor = self.geometry_merger(features)
        return merged

    def merge_zeros(self, features: list[Tensor]) -> Tensor | None:
        """The geometry operand of Phi(F2D, 0), by `model.zero_geometry`.

        ``merged``: None, zeros in place of merged tokens. ``features``: the merger's output for zero features, which
        its biases make non-zero.
        """
        if self.zero_geometry == "merged":
            return None
        return self.merge([torch.zeros_like(f) for f in features])

    def fuse(self, visual: VisionOutput, geometry: Tensor | None, mask: Mask | None = None) -> VisionOutput:
        """Phi, as a vision tower's output that the VLM takes; `visual` itself stays unchanged.

        Args:
            visual: of `encode_2d`.
            geometry: ``[tokens, hidden]`` of `merge`, or of `merge_zeros` for the shortcut.
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

    def input_streams(self, batch: Batch, fused: VisionOutput, visual_only: VisionOutput) -> tuple[Tensor, Tensor]:
        """Input embeddings of the fused and of the visual-only stream, ``[sequences, length, hidden]``, in one pass.

        Both operands are finished outputs of `fuse`, for every fusion, masking and `zero_geometry`; only
        `model.kernels` chooses the implementation, never the batch.

        Args:
            batch: token ids, and the positions of visual tokens; a dummy has none.
            fused: Phi(F2D, F3D).
            visual_only: Phi(F2D, 0); receives no gradient.
        """
        embeddings = embed(self.base, batch)
        if batch.visuals.dummy:
            return embeddings, embeddings.detach()
        # The shortcut pass has no gradient; without detach the fusion would get one through Phi(F2D, 0).
        shortcut = torch.cat(visual_only.pooler_output).detach()
        tokens, kernels = torch.cat(fused.pooler_output), implementation(self.kernels, "dual_stream_embed")
        return dual_stream_embed(embeddings, batch.visual_tokens, shortcut, tokens, kernels)

    def hidden(self, batch: Batch, visual: VisionOutput, with_what: bool = False) -> Tensor:
        """Last hidden states of the answer rows, ``[rows, hidden]``; logits of the prompt are never computed."""
        inputs = place(batch, embed(self.base, batch), visual)
        return self.row_states(batch, inputs, visual, with_what, nullcontext())

    def row_states(
        self,
        batch: Batch,
        inputs: Tensor,
        visual: VisionOutput,
        with_what: bool,
        context: AbstractContextManager[object],
    ) -> Tensor:
        """`VlmFamily.row_states` of the answer tokens; `with_what` appends those of the description's tokens.

        `context` is entered around the decoder's forward (lockstep order).
        """
        return self.family.row_states(self.base, batch, inputs, visual, *answer_positions(batch, with_what), context)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocabulary]``."""
        return self.base.lm_head(hidden)


def missing_2d(visuals: Visuals) -> int:
    """Calls of the vision tower that `W2R2.encode_2d` makes for a batch itself."""
    return sum(cached.features is None for cached in visuals.cached_2d) if visuals.cached_2d else 1


def embed(vlm: PreTrainedModel, batch: Batch) -> Tensor:
    """``[sequences, length, hidden]`` embeddings of the token ids, with placeholders at the visual tokens."""
    embeddings: Tensor = vlm.get_input_embeddings()(batch.input_ids)
    return embeddings


def place(batch: Batch, embeddings: Tensor, visual: VisionOutput) -> Tensor:
    """The embeddings with a vision tower's output at the visual tokens; unchanged for a dummy."""
    if batch.visuals.dummy:
        return embeddings
    tokens, positions = torch.cat(visual.pooler_output), batch.visual_tokens
    assert len(tokens) == len(positions), f"{len(tokens)} visual tokens, but {len(positions)} positions for them"
    # The collator has computed the positions. The stock forward would search for placeholders and copy their number to
    # the host, which waits for the device.
    return embeddings.flatten(0, 1).index_copy(0, positions, tokens.to(embeddings.dtype)).view_as(embeddings)


def answer_positions(batch: Batch, with_what: bool = False) -> tuple[Tensor, Tensor]:
    """Sequence and position, ``[rows]`` int64 each, of a batch's answer rows; `with_what` appends the description's."""
    rows = batch.answer_positions
    if not with_what:
        return rows.sequence, rows.position
    what = batch.description_positions
    return torch.cat([rows.sequence, what.sequence]), torch.cat([rows.position, what.position])


def answer_states(family: VlmFamily, vlm: PreTrainedModel, batch: Batch, visual: VisionOutput) -> Tensor:
    """Last hidden states ``[rows, hidden]`` of a batch's answer rows, for a VLM outside a `W2R2`."""
    inputs = place(batch, embed(vlm, batch), visual)
    return family.row_states(vlm, batch, inputs, visual, *answer_positions(batch), nullcontext())
