"""Sample -> Features: token ids, patches, labels and answer slots of one sample, on the CPU worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from w2r2_ds.config import DataConfig
from w2r2_ds.data.images import even_crop, load_frame, qwen_patches, resize_for_vggt
from w2r2_ds.data.sample import Sample
from w2r2_ds.data.slots import AnswerSlots, grounding_slots
from w2r2_ds.models.vlm import VisionSpec

IMAGE, VIDEO = 1, 2
"""Values of `mm_token_type_ids`; text is 0."""


@dataclass(frozen=True)
class Features:
    """One sample as tensors.

    Attributes:
        sample: where it comes from.
        input_ids: ``[tokens]`` int64: prompt, then (when training) the answer and the end of turn.
        token_types: ``[tokens]`` int64, 0 text, 1 image, 2 video.
        answer_tokens: number of trailing tokens that are the answer and its end of turn; 0 for a prompt alone.
        pixel_values: ``[patches, channels * time * patch * patch]`` float32, the vision tower's input.
        grid_thw: ``[images or 1, 3]`` int64 patch grid.
        geometry_images: ``[frames, 3, height, width]`` float32 in [0, 1], VGGT's input (not cropped).
        slots: number slots of the answer; None for a prompt alone.
    """

    sample: Sample
    input_ids: torch.Tensor
    token_types: torch.Tensor
    answer_tokens: int
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    geometry_images: torch.Tensor
    slots: AnswerSlots | None


class Processor:
    """Turn samples into tensors; equal to the stock Qwen processor on frames of the size it is given.

    Args:
        tokenizer: the VLM's tokenizer with its chat template.
        vision: patch sizes, normalisation and token ids of the VLM.
        config: frames, sizes and the form of the visual prompt.
    """

    def __init__(self, tokenizer: Any, vision: VisionSpec, config: DataConfig) -> None:
        self.tokenizer, self.vision, self.config = tokenizer, vision, config
        if config.frame_width % vision.patch_size:
            raise ValueError(
                f"data.frame_width is {config.frame_width}; make it a multiple of the patch size {vision.patch_size}."
            )
        self.end_of_turn = "<|im_end|>"
        self.special_tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; the model directory lacks chat_template.jinja.")

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample, with its answer as label or as a prompt for generation.

        Raises:
            ValueError: a frame cannot be read, text holds a special token, or the sequence is longer than
                `data.max_length`.
        """
        images = resize_for_vggt([load_frame(path) for path in sample.frames], width=self.config.frame_width)
        vision = self.vision
        cropped = even_crop(images, patch=vision.patch_size, merge=vision.merge_size)
        pixel_values, grid_thw = qwen_patches(
            cropped,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.merge_size,
            mean=vision.image_mean,
            std=vision.image_std,
            as_video=self.config.visual == "video",
        )
        prompt = self._prompt_ids(sample, np.asarray(grid_thw))
        answer, slots = self._answer(sample) if with_answer else ([], None)
        ids = torch.tensor(prompt + answer, dtype=torch.int64)
        if len(ids) > self.config.max_length:
            raise ValueError(
                f"Sample {sample.id} has {len(ids)} tokens, more than data.max_length = {self.config.max_length}; "
                "raise it or use fewer or smaller frames."
            )
        types = torch.zeros_like(ids)
        types[ids == vision.image_token_id] = IMAGE
        types[ids == vision.video_token_id] = VIDEO
        return Features(
            sample=sample,
            input_ids=ids,
            token_types=types,
            answer_tokens=len(answer),
            pixel_values=torch.as_tensor(pixel_values),
            grid_thw=torch.as_tensor(grid_thw, dtype=torch.int64),
            geometry_images=torch.as_tensor(images),
            slots=slots,
        )

    def _prompt_ids(self, sample: Sample, grid_thw: np.ndarray) -> list[int]:
        """Token ids of system turn, frames and question, placeholders expanded to one per merged patch."""
        self._refuse_special_tokens(sample, sample.question)
        if self.config.visual == "video":
            content = [{"type": "video"}]
        else:
            content = []
            for index in range(len(sample.frames)):
                content += [{"type": "text", "text": f"Frame-{index}: "}, {"type": "image"}]
        content.append({"type": "text", "text": sample.question})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = iter((grid_thw.prod(axis=-1) // self.vision.merge_size**2).tolist())
        placeholders = {self.vision.image_token_id, self.vision.video_token_id}
        found = sum(i in placeholders for i in ids)
        if found != len(grid_thw):
            raise ValueError(
                f"The chat template made {found} visual placeholders for {len(grid_thw)} images or videos; "
                "use the tokenizer files that came with the model."
            )
        return [token for i in ids for token in ([i] * next(counts) if i in placeholders else [i])]

    def _answer(self, sample: Sample) -> tuple[list[int], AnswerSlots]:
        """Token ids of the answer with its end of turn, and its number slots."""
        self._refuse_special_tokens(sample, sample.answer)
        encoded = self.tokenizer(
            sample.answer + self.end_of_turn, add_special_tokens=False, return_offsets_mapping=True
        )
        return encoded["input_ids"], grounding_slots(sample.answer, encoded["offset_mapping"])

    def _refuse_special_tokens(self, sample: Sample, text: str) -> None:
        """A description that spells a special token would turn into that token and shift every placeholder."""
        for token in self.special_tokens:
            if token in text:
                raise ValueError(f"Sample {sample.id}: its text holds the special token {token!r}; remove it there.")
