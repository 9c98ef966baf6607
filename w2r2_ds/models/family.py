"""`VlmFamily`, the interface of a family of vision-language models (VLMs), and the registry of families.

A built-in family is a folder ``models/FAMILY/`` and one line in `BUILT_IN`; others call `register_family`.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling as VisionOutput

from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.models.flops import Work, attention, products
from w2r2_ds.models.frame_pixels import even_crop
from w2r2_ds.models.patch_embedding import use_matrix_products
from w2r2_ds.types.batch import Batch, Prompts, TowerInputs, Visuals
from w2r2_ds.types.vision import TowerSizes, VisionSpec
from w2r2_ds.utils.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class VlmFamily(ABC):
    """Everything that differs between families of VLMs; `model_type` in config.json selects the family.

    An object has no state and is pickled for DataLoader workers. The default methods follow the usual names of
    transformers' vision-language classes: ``vlm.model.visual`` is the vision tower with ``blocks``,
    ``vlm.model.language_model`` the text model with ``layers`` and ``norm``, and ``config.vision_config`` has the
    ``patch_size``, ``spatial_merge_size`` and ``depth`` of the vision tower.
    """

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    vision_tokens: ClassVar[Mapping[str, str]]
    """Special token of the tokenizer -> field of config.json with its id."""
    chat_tokens: ClassVar[Sequence[str]]
    """Special tokens of the chat template, which the tokenizer must have."""
    end_of_turn: ClassVar[str]
    """Token that ends an answer in training."""
    tower_weights: ClassVar[tuple[str, ...]] = ("visual.", "model.visual.")
    """Prefixes of the names of the vision tower's weights, in published and in saved checkpoints."""
    features_version: ClassVar[int] = 2
    """Part of the key of cached 2D features; increase it when `encode_visuals` or `to_cache` gives other values."""

    def language_model(self, vlm: PreTrainedModel) -> PreTrainedModel:
        """The text model: embeddings, decoder ``layers``, final ``norm``."""
        return vlm.model.language_model

    def vision_tower(self, vlm: PreTrainedModel) -> PreTrainedModel:
        """The vision encoder, including its own patch merger."""
        return vlm.model.visual

    def tower_blocks(self, vlm: PreTrainedModel) -> nn.ModuleList:
        """The equal blocks of the vision encoder. ZeRO-3 gathers the weights of a block together."""
        blocks: nn.ModuleList = vlm.model.visual.blocks
        return blocks

    def speed_up_tower(self, vlm: PreTrainedModel) -> None:
        """Replace slow parts of the vision tower, in place; called once, after the weights are loaded.

        The outputs may change by rounding only.
        """
        use_matrix_products(self.vision_tower(vlm))

    def tower_sizes(self, config: PreTrainedConfig) -> TowerSizes:
        """Sizes of the vision tower, from config.json alone; patch and merge size are those of `vision_spec`."""
        vision: Any = config.vision_config
        return TowerSizes(int(vision.patch_size), int(vision.spatial_merge_size), int(vision.depth))

    def mlp_width(self, config: PreTrainedConfig) -> int:
        """Width inside the MLPs of the language model, at which `model.kernels: auto` measures."""
        return int(config.get_text_config().intermediate_size)

    def cache_channels(self, config: PreTrainedConfig) -> int:
        """Channels of `to_cache`'s result, from config.json alone: the width of the language model."""
        return int(config.get_text_config().hidden_size)

    @abstractmethod
    def vision_spec(self, config: PreTrainedConfig, preprocessor: Mapping[str, Any], location: str) -> VisionSpec:
        """Sizes and token ids from config.json and preprocessor_config.json.

        Args:
            config: VLM configuration.
            preprocessor: fields of preprocessor_config.json.
            location: path of preprocessor_config.json, for messages.

        Raises:
            ValueError: a field is missing, or the two files differ in a size.
        """

    def grid_thw(self, frames: int, height: int, width: int, vision: VisionSpec, kind: str) -> Tensor:
        """Patch grids of a frame set, ``[images or 1, 3]`` int64 (time, height, width); on the CPU.

        Args:
            frames: number of frames.
            height, width: sides in pixels, multiples of patch_size * merge_size.
            vision: patch sizes.
            kind: ``"image"`` for one image per frame, ``"video"`` for one video of all frames.
        """
        rows, columns = height // vision.patch_size, width // vision.patch_size
        if kind == "video":
            return torch.tensor([[-(-frames // vision.temporal_patch_size), rows, columns]])
        return torch.tensor([[1, rows, columns]] * frames)

    @abstractmethod
    def pixel_values(self, frames: Tensor, vision: VisionSpec, kind: str) -> Tensor:
        """Cut a frame set into normalised patches, in the order that the vision tower expects; on the frames' device.

        It runs on the GPU in every step: an operator that makes the host wait, such as a copy of constants from the
        host, costs time (``models/frame_pixels.py`` has such arithmetic without one).

        Args:
            frames: ``[frames, 3, height, width]`` uint8; sides are multiples of patch_size * merge_size.
            vision: sizes and normalisation.
            kind: ``"image"`` for one image per frame, ``"video"`` for one video of all frames.

        Returns:
            ``[patches, values]`` float32, in the order of `grid_thw`.

        Raises:
            ValueError: `frames` has another shape or dtype, or sides that are not such multiples.
        """

    def tower_pixels(self, visuals: Visuals, dtype: torch.dtype) -> Tensor:
        """Pixel values of all frame sets in `visuals.tower_frames`, ``[patches, values]`` in `dtype`."""
        vision, values = visuals.vision, []
        for frames in visuals.tower_frames:  # one by one: float32 values exist for one frame set at a time
            cropped = even_crop(frames, vision.patch_size, vision.merge_size)
            values.append(self.pixel_values(cropped, vision, visuals.kind).to(dtype))
        return values[0] if len(values) == 1 else torch.cat(values)

    @abstractmethod
    def tower_inputs(self, grid_thw: Tensor, vision: VisionSpec) -> TowerInputs:
        """Inputs of the vision tower that depend only on the ``[images or videos, 3]`` patch grids; on the CPU."""

    @abstractmethod
    def position_ids(
        self,
        vlm: PreTrainedModel,
        input_ids: Tensor,
        token_types: Tensor,
        attention_mask: Tensor | None,
        grids: Mapping[str, Tensor],
        seconds_per_grid: float,
    ) -> Tensor:
        """Rotary positions of padded sequences, on the CPU.

        Args:
            vlm: model on the meta device; only its config and methods are used.
            input_ids, token_types, attention_mask: ``[sequences, length]``, as in `Batch`.
            grids: ``"image"`` or ``"video"`` -> ``[n, 3]`` patch grids in order of appearance.
            seconds_per_grid: seconds between temporal patches of a video.

        Returns:
            ``[axes, sequences, length]`` int64; several axes for multimodal positions (time, height, width).
        """

    @abstractmethod
    def encode_visuals(self, vlm: PreTrainedModel, visuals: Visuals) -> VisionOutput:
        """Run the vision tower; returns F2D in `pooler_output`, ``[tokens, hidden]`` per image or pair of video frames.

        A family with extra visual features for some decoder layers (DeepStack) returns them in further fields of the
        output. `W2R2.fuse` changes `pooler_output` and keeps all other fields. Such a family also overrides
        `cache_channels`, `to_cache`, `from_cache`, `select` and `add_layer_features`.
        """

    def to_cache(self, visual: VisionOutput) -> Tensor:
        """Pack the vision tower's output into one tensor ``[tokens, channels]`` for the feature cache."""
        return torch.cat(visual.pooler_output)

    def from_cache(self, features: Tensor, sizes: Sequence[int]) -> VisionOutput:
        """Inverse of `to_cache`; `sizes` are the numbers of tokens of the images."""
        return VisionOutput(pooler_output=torch.split(features, list(sizes)))

    def select(self, visual: VisionOutput, indices: Sequence[int]) -> VisionOutput:
        """Vision output of the images (or pairs of frames) at `indices`, in this order; indices may repeat."""
        selected = copy.copy(visual)
        selected.pooler_output = tuple(visual.pooler_output[index] for index in indices)
        return selected

    @abstractmethod
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
        """Run the language model on input embeddings; returns the last hidden states of selected tokens.

        Args:
            vlm: the transformers model.
            batch: layout of the sequences and position ids.
            inputs: ``[sequences, length, hidden]`` input embeddings, visual tokens in place.
            visual: the vision output that `inputs` contain; has the extra features for some layers (DeepStack).
            sequence, position: ``[selected]`` int64, the selected tokens.
            context: context manager that must be active while the decoder layers run.

        Returns:
            ``[selected, hidden]``, after the final norm. The last layer should compute only these.
        """

    def add_layer_features(self, hidden: Tensor, layer: int, batch: Batch, visual: VisionOutput) -> Tensor:
        """Add the extra visual features for decoder layer `layer` to its output ``[sequences, length, hidden]``.

        Called for the shortcut pass with `train.pass_order: lockstep` only; in every other case `run_decoder` must add
        them itself.
        """
        return hidden

    def row_attention(
        self, layer: nn.Module, selected: SelectedTokens, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        """Attention weights of selected tokens in a decoder layer, as the layer itself computes them, block by block.

        Used by `objective.shortcut_decode: anchor` and by the diagnosis of attention; a family without it does all
        else.

        Args:
            layer: a decoder layer.
            selected: tokens whose weights are computed, and their mask.
            hidden: ``[sequences, length, hidden]``, the layer's input.
            arguments: keyword arguments of the layer's forward, with the rotary positions.

        Returns:
            Blocks ``[heads, rows, sequences * length]`` float32 without gradient, of consecutive selected tokens. All
            rows at once would need memory that grows with the square of the micro-batch.

        Raises:
            ValueError: the family does not define it.
        """
        raise ValueError(_no_row_attention(self))

    @abstractmethod
    def use_packed_attention(self, vlm: PreTrainedModel) -> None:
        """Switch the text model to an attention that supports packed sequences (`Layout`).

        Raises:
            ValueError: its attention implementation has no packed form.
        """

    def end_tokens(self, vlm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Ids of the tokens at which `generate` stops: `end_of_turn`, and all of the generation configuration.

        generation_config.json of Qwen2.5-VL has ``<|im_end|>`` and ``<|endoftext|>``. An answer that went on after
        either of them would differ from that of transformers' `generate`.
        """
        configured = vlm.generation_config.eos_token_id  # an id, a list of ids, or None
        ids = [configured] if isinstance(configured, int) else configured or []
        end_of_turn: int = tokenizer.convert_tokens_to_ids(self.end_of_turn)
        return tuple(dict.fromkeys([end_of_turn, *ids]))

    @abstractmethod
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
        """Decode answers greedily.

        Args:
            vlm: the transformers model.
            prompts: left-padded prompts.
            visuals: kind and grids of the frames.
            visual: vision output of the prompts' images, fused or not.
            tokenizer: the VLM's tokenizer.
            max_new_tokens: maximum number of tokens of an answer.
            video_fps: nominal frame rate of videos.
            synced_gpus: make as many forward passes as the rank with the longest answer. Required with several ranks
                under ZeRO-3, where each forward is a collective.

        Returns:
            Token ids per prompt, up to the first of `end_tokens`.
        """

    @abstractmethod
    def vision_flops(self, tower: nn.Module, grids: Sequence[Sequence[int]]) -> float:
        """FLOPs of a forward pass of the vision tower; `grids` has (time, height, width) in patches per image."""

    def decoder_flops(
        self, vlm: PreTrainedModel, tokens: int, pairs: float, selected: int | None = None, selected_pairs: float = 0.0
    ) -> tuple[Work, Work]:
        """FLOPs of the decoder layers without the output head, as (linear layers, attention).

        Args:
            vlm: model on any device, also the meta device.
            tokens: number of tokens of all sequences.
            pairs: pairs of tokens in a layer's attention, see `flops.tokens_and_pairs`.
            selected: number of tokens for which the last layer is computed, as in `run_decoder`; None for all.
            selected_pairs: pairs of a selected token and a token that it attends to.
        """
        layers: Any = self.language_model(vlm).layers
        last = layers[-1]
        channels = last.self_attn.num_heads * last.self_attn.head_dim
        full_layers = len(layers) if selected is None else len(layers) - 1
        linear, scores = products(layers[0], tokens) * full_layers, attention(channels, pairs) * full_layers
        if selected is not None:
            # The last layer: keys and values of all tokens, everything else of the selected ones.
            for module in (last.self_attn.k_proj, last.self_attn.v_proj):
                linear = linear + products(module, tokens)
            for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp):
                linear = linear + products(module, selected)
            scores = scores + attention(channels, selected_pairs)
        return linear, scores


def require_row_attention(family: VlmFamily) -> None:
    """Raise ValueError unless the family defines `row_attention`."""
    if type(family).row_attention is VlmFamily.row_attention:
        raise ValueError(_no_row_attention(family))


def _no_row_attention(family: VlmFamily) -> str:
    return (
        f"The VLM family {family.model_type} defines no `row_attention`; without it, attention cannot be diagnosed, "
        "and objective.shortcut_decode cannot be anchor."
    )


def cut_at_end(tokens: Sequence[int], end_tokens: Collection[int]) -> list[int]:
    """The tokens before the first end token; all of them if there is none."""
    return list(itertools.takewhile(lambda token: token not in end_tokens, tokens))


BUILT_IN = {"qwen2_5_vl": "w2r2_ds.models.qwen2_5_vl.family"}
"""`model_type` -> module, imported on first use; it registers its family."""

VLM_FAMILIES: Registry[VlmFamily] = Registry("model_type", BUILT_IN)


def register_family(family: VlmFamily) -> None:
    """Register a family under its `model_type`; raises ValueError if another family has it."""
    VLM_FAMILIES.register(family.model_type, family)


def find_family(model_type: str | None, location: str = "config.json") -> VlmFamily:
    """Family of a `model_type`; raises ValueError with the file `location` if there is none."""
    return VLM_FAMILIES.find(model_type or "", f"{location}: model_type")
