"""The composed model: a VLM with LoRA, a trained geometry merger and fusion, and a frozen geometry encoder."""

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
from w2r2_ds.kernels.select import TORCH_KERNELS, Kernels, backend_of
from w2r2_ds.models.family import VlmFamily, find_family
from w2r2_ds.models.fusion import Fusion
from w2r2_ds.models.geometry.encoder import GeometryEncoder
from w2r2_ds.models.geometry.resampling import resample_to_patches
from w2r2_ds.models.layer_inputs import OnInput, on_layer_inputs
from w2r2_ds.models.merger import GeometryMerger, pair_frames
from w2r2_ds.types.batch import Batch, Visuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask = Callable[[Sequence[Tensor]], list[Tensor]]
"""Visual tokens ``[tokens, hidden]`` of every image -> the same, with some tokens set to zero."""


class W2R2(nn.Module):
    """A VLM that answers from fused visual tokens Phi(F2D, F3D), or from those of the shortcut (2D only), Phi(F2D, 0).

    F2D are the visual tokens of the VLM's vision tower, F3D the features of the geometry encoder. The merger turns F3D
    into tokens of the same shape as F2D before the fusion.

    Args:
        vlm: a transformers VLM or a PeftModel around one.
        geometry_merger: maps geometry features to tokens of the VLM's width.
        fusion: Phi.
        geometry: frozen encoder; not a submodule, so that DeepSpeed neither shards nor saves it.
        zero_geometry: `model.zero_geometry`: the zeros in Phi(F2D, 0) replace the ``"merged"`` tokens or the encoder's
            ``"features"``.
        kernels: names of the enabled kernels; `bind_kernels` has already installed those that replace a forward.

    Attributes:
        fingerprint: `models.build.fingerprint`; empty unless `build_model` made the model.
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
        self.fingerprint: dict[str, Any] = {}
        # nn.Module.__setattr__ would register an encoder that is a module; ZeRO-3 would then shard and save it.
        object.__setattr__(self, "_geometry", geometry)

    @property
    def geometry(self) -> GeometryEncoder:
        """The frozen geometry encoder."""
        return cast(GeometryEncoder, self.__dict__["_geometry"])

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside the PeftModel, with LoRA layers in place."""
        return self.vlm.get_base_model() if isinstance(self.vlm, PeftModel) else self.vlm

    def geometry_modules(self) -> dict[str, nn.Module]:
        """The modules that train besides LoRA, in an optimizer group of their own; the fusion `add` has no weights."""
        return {"geometry_merger": self.geometry_merger, "fusion": self.fusion}

    @torch.no_grad()
    def encode_2d(self, visuals: Visuals, min_calls: int = 0) -> VisionOutput:
        """F2D of a batch, without gradient: from the feature cache if it has them, else from the vision tower.

        Args:
            visuals: visual inputs of a batch.
            min_calls: minimum number of vision tower forwards; the additional ones run on the dummy image. Requires
                cached 2D features.
        """
        if not visuals.cached_2d:
            assert visuals.dummy or not min_calls, "`min_calls` requires cached 2D features"
            output, calls = self.family.encode_visuals(self.base, visuals), 1
        else:
            # One call per frame set, so that a cached value does not depend on the other samples of the batch: the
            # size of a matrix product may change its rounding.
            features, calls = [], 0
            for cached, inputs in zip(visuals.cached_2d, visuals.uncached, strict=True):
                if cached.features is None:
                    assert inputs is not None, "the collator keeps the frames of uncached samples"
                    features.append(self.family.to_cache(self.family.encode_visuals(self.base, inputs)))
                    cached.write_async(features[-1])
                    calls += 1
                else:
                    features.append(cached.features)
            output = self.family.from_cache(torch.cat(features), visuals.sizes)
        # ZeRO-3 gathers the tower's weights in every call, and a gather is a collective: a rank with fewer uncached
        # samples than another must still call the tower as often, else both would hang. The output is discarded.
        for _ in range(min_calls - calls):
            self.family.encode_visuals(self.base, visuals.filler or visuals)
        return output

    @torch.no_grad()
    def encode_3d(self, visuals: Visuals) -> list[Tensor]:
        """F3D: geometry features per frame set, ``[frames, h, w, channels]``, from the cache or the encoder.

        With videos, ``frames`` are pairs of frames. The grid is that of the vision tower's patches, or larger by rows
        and columns at the bottom and the right, which the merger crops.
        """
        features = []
        cached_3d = visuals.cached_3d or (None,) * len(visuals.geometry_frames)
        references = visuals.scale_reference or (None,) * len(visuals.geometry_frames)
        # One call per frame set: the encoder attends over all frames of a call, which must belong to one scene.
        for cached, frames, reference in zip(cached_3d, visuals.geometry_frames, references, strict=True):
            if cached is not None and cached.features is not None:
                features.append(cached.features)
                continue
            assert frames is not None, "the collator keeps the frames of uncached samples"
            features.append(self.geometry.encode_frames(frames, reference))
            if cached is not None:
                cached.write_async(features[-1])
        # A temporal patch of a video covers two frames, a geometry feature one frame.
        if visuals.kind == "video":
            features = [pair_frames(f) for f in features]
        # After the cache, which stores the encoder's own grid and does not depend on the vision tower.
        tower, geometry_patch = self.family.tower_sizes(self.base.config), self.geometry.spec.patch_size
        return [resample_to_patches(f, geometry_patch, tower.patch_size, tower.merge_size) for f in features]

    def merge(self, features: list[Tensor]) -> Tensor:
        """Geometry tokens ``[tokens, hidden]`` of all frame sets, in the order of the visual tokens."""
        merged: Tensor = self.geometry_merger(features)
        return merged

    def zero_geometry_tokens(self, features: list[Tensor]) -> Tensor | None:
        """The geometry operand of Phi(F2D, 0), by `model.zero_geometry`.

        Args:
            features: result of `encode_3d`; only the shapes are used.

        Returns:
            ``merged``: None, for which the fusion uses zeros. ``features``: the merger's output for zero features,
            ``[tokens, hidden]``; the merger's biases make it non-zero.
        """
        if self.zero_geometry == "merged":
            return None
        return self.merge([torch.zeros_like(f) for f in features])

    def fuse(self, visual: VisionOutput, geometry: Tensor | None, mask: Mask | None = None) -> VisionOutput:
        """Apply Phi; returns a copy of `visual` with fused tokens.

        Args:
            visual: result of `encode_2d`.
            geometry: ``[tokens, hidden]``, result of `merge`, or of `zero_geometry_tokens` for the shortcut.
            mask: applied to the 2D tokens before the fusion, in the fused pass of training only (`token_masking.py`).
        """
        assert mask is None or geometry is not None, "the shortcut is never masked"
        images = list(visual.pooler_output) if mask is None else mask(visual.pooler_output)
        sizes = [len(tokens) for tokens in images]
        # A shallow copy keeps all other fields of the output, such as visual features for some decoder layers.
        fused = copy.copy(visual)
        # The fusion also runs for a batch without frames (dummy): ZeRO-3 needs the same modules on every rank.
        fused.pooler_output = torch.split(self.fusion(torch.cat(images), geometry, sizes), sizes)
        return fused

    def input_streams(self, batch: Batch, shortcut: VisionOutput, fused: VisionOutput) -> tuple[Tensor, Tensor]:
        """Input embeddings of the shortcut and of the fused pass, ``[sequences, length, hidden]`` each.

        Args:
            batch: token ids, and the positions of visual tokens; a dummy has none.
            shortcut: Phi(F2D, 0), from `fuse`; receives no gradient.
            fused: Phi(F2D, F3D), from `fuse`.
        """
        embeddings = embed_tokens(self.base, batch)
        if batch.visuals.dummy:
            return embeddings.detach(), embeddings
        # Both streams go through one autograd function. Without detach, the fusion would get a gradient through
        # Phi(F2D, 0), although the shortcut pass has no graph.
        operands = torch.cat(shortcut.pooler_output).detach(), torch.cat(fused.pooler_output)
        kernels = backend_of(self.kernels, "dual_stream_embed")
        return dual_stream_embed(embeddings, batch.visual_tokens, *operands, kernels)

    def answer_hidden_states(
        self, batch: Batch, visual: VisionOutput, include_description: bool = False, on_input: OnInput | None = None
    ) -> Tensor:
        """Last hidden states ``[answer tokens, hidden]`` of one pass, see `run_decoder`.

        `on_input` is called with the input of every decoder layer; None for no call.
        """
        inputs = insert_visual_tokens(batch, embed_tokens(self.base, batch), visual)
        layers = self.family.language_model(self.base).layers
        context = nullcontext() if on_input is None else on_layer_inputs(layers, on_input)
        return self.run_decoder(batch, inputs, visual, include_description, context)

    def run_decoder(
        self,
        batch: Batch,
        inputs: Tensor,
        visual: VisionOutput,
        include_description: bool,
        context: AbstractContextManager[object],
    ) -> Tensor:
        """Run the language model on input embeddings; returns last hidden states ``[answer tokens, hidden]``.

        An answer token's state is the one that predicts it, so no logits of the prompt are computed.

        Args:
            batch: layout, position ids and answer positions.
            inputs: ``[sequences, length, hidden]`` input embeddings, visual tokens in place.
            visual: the vision output that `inputs` contain.
            include_description: append the states of the description's tokens.
            context: entered around the decoder's forward (lockstep order).
        """
        tokens = answer_indices(batch, include_description)
        return self.family.run_decoder(self.base, batch, inputs, visual, *tokens, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: ``[tokens, hidden]`` -> ``[tokens, vocabulary]``."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        return logits


def num_tower_calls(visuals: Visuals) -> int:
    """Number of vision tower forwards that a batch needs, without additional calls on the dummy."""
    return sum(cached.features is None for cached in visuals.cached_2d) if visuals.cached_2d else 1


def embed_tokens(vlm: PreTrainedModel, batch: Batch) -> Tensor:
    """Embeddings ``[sequences, length, hidden]`` of the token ids, with placeholders at the visual tokens."""
    embeddings: Tensor = vlm.get_input_embeddings()(batch.input_ids)
    return embeddings


def insert_visual_tokens(batch: Batch, embeddings: Tensor, visual: VisionOutput) -> Tensor:
    """Insert visual tokens into the ``[sequences, length, hidden]`` embeddings; returns them unchanged for a dummy."""
    if batch.visuals.dummy:
        return embeddings
    tokens, positions = torch.cat(visual.pooler_output), batch.visual_tokens
    assert len(tokens) == len(positions), f"{len(tokens)} visual tokens, but {len(positions)} positions for them"
    # The collator has computed the positions. transformers' forward would search for placeholders and copy their number
    # to the host, which waits for the device.
    return embeddings.flatten(0, 1).index_copy(0, positions, tokens.to(embeddings.dtype)).view_as(embeddings)


def answer_indices(batch: Batch, include_description: bool = False) -> tuple[Tensor, Tensor]:
    """Sequence and position of the hidden states that predict the answer tokens, int64 ``[answer tokens]`` each.

    With `include_description`, followed by those of the description's tokens.
    """
    answer = batch.answer_positions
    if not include_description:
        return answer.sequence, answer.position
    description = batch.description_positions
    return torch.cat([answer.sequence, description.sequence]), torch.cat([answer.position, description.position])


def answer_states(family: VlmFamily, vlm: PreTrainedModel, batch: Batch, visual: VisionOutput) -> Tensor:
    """`W2R2.answer_hidden_states` of a VLM without geometry."""
    inputs = insert_visual_tokens(batch, embed_tokens(vlm, batch), visual)
    return family.run_decoder(vlm, batch, inputs, visual, *answer_indices(batch), nullcontext())
