"""Example: add a VLM family, in one file outside the package.

    python launchers/train.py --plugin examples/custom_vlm_family.py --config RECIPE.yaml --model.vlm DIRECTORY ...

`stacked_vl` is Qwen2.5-VL with extra visual features for a decoder layer, as in DeepStack (arXiv 2406.04334) and
Qwen3-VL: the 2D tokens are added once more, to the output of the first layer. DIRECTORY is a model saved with
``StackedVLM.save_pretrained``, with the tokenizer and processor files of Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

from w2r2_ds.models.family import register_family
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.types.batch import Batch, Visuals

LAYER = 0
"""Decoder layer to whose output the features are added."""


class StackedConfig(Qwen2_5_VLConfig):
    """Configuration of the model; `model_type` selects the family."""

    model_type = "stacked_vl"


class StackedVLM(Qwen2_5_VLForConditionalGeneration):
    """The transformers model."""

    config_class = StackedConfig


class StackedFamily(Qwen25VL):
    """Qwen2.5-VL with extra features, which are a further field `stacked` of the vision output, ``[tokens, hidden]``.

    Everything else is inherited.
    """

    model_type = "stacked_vl"

    def encode_visuals(self, vlm: Any, visuals: Visuals) -> VisionOutput:
        output: Any = super().encode_visuals(vlm, visuals)
        output.stacked = torch.cat(output.pooler_output)
        return output  # type: ignore[no-any-return]

    # The feature cache stores one tensor per frame set: the extra features are further channels of it.

    def cache_channels(self, config: Any) -> int:
        return 2 * super().cache_channels(config)

    def to_cache(self, visual: Any) -> Tensor:
        return torch.cat([torch.cat(visual.pooler_output), visual.stacked], dim=-1)

    def from_cache(self, features: Tensor, sizes: Sequence[int]) -> VisionOutput:
        pooled, stacked = features.chunk(2, dim=-1)
        output: Any = super().from_cache(pooled, sizes)
        output.stacked = stacked
        return output  # type: ignore[no-any-return]

    def select(self, visual: Any, indices: Sequence[int]) -> VisionOutput:
        selected: Any = super().select(visual, indices)
        parts = visual.stacked.split([len(tokens) for tokens in visual.pooler_output])
        selected.stacked = torch.cat([parts[index] for index in indices])
        return selected  # type: ignore[no-any-return]

    def add_layer_features(self, hidden: Tensor, layer: int, batch: Batch, visual: Any) -> Tensor:
        # With `train.pass_order: lockstep` the shortcut's layers run inside those of the fused pass, without its hook.
        if layer != LAYER or batch.visuals.dummy:  # the tokens of a dummy are in no sequence
            return hidden
        return self.add_features(hidden, batch.visual_tokens, visual)

    def run_decoder(self, vlm: Any, batch: Batch, inputs: Tensor, visual: Any, *args: Any) -> Tensor:
        positions = None if batch.visuals.dummy else batch.visual_tokens
        with self.features_hook(vlm, inputs.shape[1], positions, visual):
            return super().run_decoder(vlm, batch, inputs, visual, *args)

    def generate(self, vlm: Any, prompts: Any, visuals: Visuals, visual: Any, *args: Any, **kwargs: Any) -> Any:
        # In a prompt, the visual tokens are those with a token type other than text (0).
        positions = None if visuals.dummy else prompts.token_types.flatten().nonzero().flatten()
        with self.features_hook(vlm, prompts.input_ids.shape[1], positions, visual):
            return super().generate(vlm, prompts, visuals, visual, *args, **kwargs)

    @contextmanager
    def features_hook(self, vlm: Any, length: int, positions: Tensor | None, visual: Any) -> Iterator[None]:
        """Context in which the features are added to the output of the layer, for inputs of `length` tokens."""

        def hook(module: Any, args: Any, hidden: Tensor) -> Tensor | None:
            # Other lengths are single tokens, decoded with the KV cache. None leaves the output unchanged.
            if positions is None or hidden.shape[1] != length:
                return None
            return self.add_features(hidden, positions, visual)

        handle = self.language_model(vlm).layers[LAYER].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def add_features(self, hidden: Tensor, positions: Tensor, visual: Any) -> Tensor:
        """Add the features at `positions` (sequence * length + position) to ``[sequences, length, hidden]``."""
        return hidden.flatten(0, 1).index_add(0, positions, visual.stacked).view_as(hidden)


AutoConfig.register("stacked_vl", StackedConfig, exist_ok=True)
AutoModelForImageTextToText.register(StackedConfig, StackedVLM, exist_ok=True)
register_family(StackedFamily())
