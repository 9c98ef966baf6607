"""`VlmFamily` of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

from w2r2_ds.models.attention.packed import attention_inputs, use_packed_attention
from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.models.attention.vision import use_varlen_attention
from w2r2_ds.models.family import VlmFamily, cut_at_end, register_family
from w2r2_ds.models.flops import attention, products
from w2r2_ds.models.qwen2_5_vl.last_layer import compute_only
from w2r2_ds.models.qwen2_5_vl.pixels import patchify
from w2r2_ds.models.qwen2_5_vl.row_attention import row_attention
from w2r2_ds.models.qwen2_5_vl.vision_inputs import WindowInputs
from w2r2_ds.types.batch import Batch, Prompts, Visuals
from w2r2_ds.types.vision import VisionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Qwen25VL(VlmFamily):
    """Qwen2.5-VL: window attention in the vision tower, three rotary axes, no extra visual features (DeepStack)."""

    model_type = "qwen2_5_vl"
    vision_tokens: ClassVar[Mapping[str, str]] = {
        "<|image_pad|>": "image_token_id",
        "<|video_pad|>": "video_token_id",
        "<|vision_start|>": "vision_start_token_id",
        "<|vision_end|>": "vision_end_token_id",
    }

    chat_tokens = ("<|im_start|>", "<|im_end|>")
    end_of_turn = "<|im_end|>"

    def speed_up_tower(self, vlm: PreTrainedModel) -> None:
        super().speed_up_tower(vlm)
        use_varlen_attention(vlm)

    def vision_spec(self, config: PreTrainedConfig, preprocessor: Mapping[str, Any], location: str) -> VisionSpec:
        vision: Any = config.vision_config
        tower = self.tower_sizes(config)
        sizes = {
            "patch_size": tower.patch_size,
            "merge_size": tower.merge_size,
            "temporal_patch_size": int(vision.temporal_patch_size),
        }
        for field, size in sizes.items():
            if preprocessor.get(field, size) != size:
                raise ValueError(
                    f"{location}: {field} is {preprocessor[field]} but config.json has {size}; take both files from "
                    "the same model"
                )
        return VisionSpec(
            **sizes,
            window_size=int(vision.window_size),
            image_mean=_three(preprocessor, "image_mean", location),
            image_std=_three(preprocessor, "image_std", location),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_id=config.vision_start_token_id,
            tokens_per_second=int(vision.tokens_per_second),
        )

    def pixel_values(self, frames: Tensor, vision: VisionSpec, kind: str) -> Tensor:
        sizes = vision.patch_size, vision.temporal_patch_size, vision.merge_size
        return patchify(frames, *sizes, vision.image_mean, vision.image_std, as_video=kind == "video")

    def tower_inputs(self, grid_thw: Tensor, vision: VisionSpec) -> WindowInputs:
        return WindowInputs.of(grid_thw, vision.merge_size, vision.window_size, vision.patch_size)

    def position_ids(
        self,
        vlm: PreTrainedModel,
        input_ids: Tensor,
        token_types: Tensor,
        attention_mask: Tensor | None,
        grids: Mapping[str, Tensor],
        seconds_per_grid: float,
    ) -> Tensor:
        """As `VlmFamily.position_ids`, with transformers' ``get_rope_index``.

        Raises:
            ValueError: the token types do not mark exactly the placeholder tokens, or the grids have another number of
                tokens. ``get_rope_index`` would return wrong positions without an error.
        """
        config: Any = vlm.config
        if token_types.shape != input_ids.shape:
            raise ValueError(f"token_types is {tuple(token_types.shape)} but input_ids is {tuple(input_ids.shape)}")
        # One placeholder per merged patch, for images and videos.
        merge = config.vision_config.spatial_merge_size**2
        for kind, code, pad in (("image", 1, config.image_token_id), ("video", 2, config.video_token_id)):
            marked = token_types == code
            if not torch.equal(marked, input_ids == pad):
                raise ValueError(f"token_types must be {code} exactly where input_ids is the {kind} pad token {pad}")
            expected = int(grids[kind].prod(-1).sum()) // merge if kind in grids else 0
            if int(marked.sum()) != expected:
                raise ValueError(f"{int(marked.sum())} {kind} pad tokens in the batch but the grids hold {expected}")
        video = grids.get("video")
        positions: Tensor
        positions, _ = vlm.model.get_rope_index(
            input_ids,
            token_types,
            image_grid_thw=grids.get("image"),
            video_grid_thw=video,
            second_per_grid_ts=None if video is None else torch.full((len(video),), seconds_per_grid),
            attention_mask=attention_mask,
        )
        return positions

    def encode_visuals(self, vlm: PreTrainedModel, visuals: Visuals) -> VisionOutput:
        # Not `get_image_features`: it copies the grids to the host to split the tokens, which waits for the device.
        tower = self.vision_tower(vlm)
        assert isinstance(visuals.tower, WindowInputs), "the collator calls `tower_inputs` of this family"
        inputs = visuals.tower.arguments(tower.config)
        output = tower(self.tower_pixels(visuals, tower.dtype), grid_thw=visuals.grid_thw, return_dict=True, **inputs)
        output.pooler_output = torch.split(output.pooler_output, list(visuals.sizes))
        return output

    def run_decoder(
        self,
        vlm: PreTrainedModel,
        batch: Batch,
        inputs: Tensor,
        visual: VisionOutput,
        sequence: Tensor,
        position: Tensor,
        context: AbstractContextManager[object],
    ) -> Tensor:
        assert batch.layout is not None, "a training batch has a layout"
        text = self.language_model(vlm)
        # `compute_only` first, so that `context` (lockstep order) can wrap the overridden forward of the last layer.
        with compute_only(text.layers[-1], SelectedTokens.of(batch.layout, sequence, position)), context:
            states: Tensor = text(
                inputs_embeds=inputs,
                position_ids=batch.position_ids,
                use_cache=False,
                **attention_inputs(vlm, batch.layout),
            ).last_hidden_state
        return states

    def row_attention(
        self, layer: nn.Module, selected: SelectedTokens, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        return row_attention(layer, selected, hidden, arguments["position_embeddings"])

    def use_packed_attention(self, vlm: PreTrainedModel) -> None:
        use_packed_attention(vlm)

    @torch.no_grad()
    def generate(
        self,
        vlm: PreTrainedModel,
        prompts: Prompts | Batch,
        visuals: Visuals,
        visual: VisionOutput,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        video_fps: float,
        synced_gpus: bool = False,
    ) -> list[list[int]]:
        end_tokens = self.end_tokens(vlm, tokenizer)
        # With `mm_encoder_outputs`, transformers uses the given (fused) visual tokens instead of the vision tower.
        multimodal: dict[str, Any] = {}
        if not visuals.dummy:
            grids = visuals.grid_thw
            multimodal = {"mm_encoder_outputs": {visuals.kind: visual}, f"{visuals.kind}_grid_thw": grids}
            if visuals.kind == "video":
                seconds = vlm.config.vision_config.temporal_patch_size / video_fps
                multimodal["second_per_grid_ts"] = torch.full((len(grids),), seconds, device=grids.device)
        training = vlm.training
        vlm.eval()  # training mode would disable the KV cache (activation checkpointing) and enable dropout
        try:
            output = vlm.generate(
                input_ids=prompts.input_ids,
                attention_mask=prompts.attention_mask,
                mm_token_type_ids=prompts.token_types,
                do_sample=False,
                num_beams=1,
                # generation_config.json of Qwen2.5-VL has a repetition penalty, which would change digits.
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(end_tokens),
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=synced_gpus,
                **multimodal,
            )
        finally:
            vlm.train(training)
        answers = output[:, prompts.input_ids.shape[1] :].tolist()
        return [cut_at_end(answer, end_tokens) for answer in answers]

    def vision_flops(self, tower: nn.Module, grids: Sequence[Sequence[int]]) -> float:
        config, modules = cast(Any, tower.config), cast(Any, tower)
        patches = sum(time * height * width for time, height, width in grids)
        # A few blocks attend over the whole frame, the others within square windows.
        side = config.window_size // config.patch_size  # in patches
        frame_pairs = sum(time * (height * width) ** 2 for time, height, width in grids)
        # A window of a x b patches has (a * b) ** 2 pairs. Their sum over all windows of a frame is a product of sums
        # over the rows and the columns of windows.
        window_pairs = sum(time * squares(height, side) * squares(width, side) for time, height, width in grids)
        frame_blocks = len(config.fullatt_block_indexes)
        window_blocks = config.depth - frame_blocks
        scores = attention(config.hidden_size, frame_blocks * frame_pairs + window_blocks * window_pairs)
        linear = products(modules.patch_embed, patches) + products(modules.blocks[0], patches) * config.depth
        merger = products(modules.merger, patches // config.spatial_merge_size**2)
        return (linear + scores + merger).forward


def squares(length: int, side: int) -> int:
    """Sum of the squared lengths of the windows of length `side` that cover `length`; the last may be shorter."""
    return length // side * side**2 + (length % side) ** 2


def _three(raw: Mapping[str, Any], field: str, location: str) -> tuple[float, float, float]:
    """Three numbers of preprocessor_config.json, one per channel. Raises ValueError if the field is anything else."""
    values = raw.get(field)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{location}: {field} must be a list of three numbers, found {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


register_family(Qwen25VL())
