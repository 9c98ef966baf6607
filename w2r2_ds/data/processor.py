"""`Processor`: tokenize a sample and preprocess its frames into `Features`; runs in DataLoader workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.answer_tokens import AnswerTokens, find_answer_tokens, what_tokens
from w2r2_ds.data.visual_inputs import VisualInputs, VisualPreprocessor
from w2r2_ds.features.lookup import FeatureCache
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec

IMAGE, VIDEO = 1, 2
"""Values of `mm_token_type_ids`; text is 0."""

QUESTION_PLACEHOLDER = "\ue000"
"""Stands for the question when the chat template is rendered: a private-use character, in no template or question."""

MERGE_MARGIN = 64
"""Upper bound of the tokens that a text has in excess of the sum over its parts; 0 if they meet at special tokens."""


class SequenceTooLong(ValueError):
    """A sample has more tokens than `data.max_length`.

    Attributes:
        tokens: number of tokens of the sample.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class Features:
    """Tensors of one sample.

    Attributes:
        sample: the sample.
        input_ids: ``[tokens]`` int64, the prompt; for training also the answer and the end of turn.
        token_types: ``[tokens]`` int64, 0 text, 1 image, 2 video.
        num_answer_tokens: number of tokens at the end of `input_ids` that are the answer and the end of turn; 0 without
            answer.
        visual: inputs of both encoders, or their cached features.
        what: ``[tokens]`` bool mask of the *what* tokens: the description in the prompt.
        answer_tokens: *where* and digit tokens of the answer; None without answer.
        draw: number of the random draw that changed the geometry (`GeometryAugmentation`): of samples with the same
            frames, those with the same number have the same geometry; -1 for unchanged geometry.
    """

    sample: Sample
    input_ids: torch.Tensor
    token_types: torch.Tensor
    num_answer_tokens: int
    visual: VisualInputs
    what: torch.Tensor
    answer_tokens: AnswerTokens | None
    draw: int = -1


class Processor:
    """Convert samples to tensors. For frames that need no resizing, the result equals transformers' own processor's.

    Args:
        tokenizer: the VLM's tokenizer with its chat template.
        family: VLM family; computes pixel values, and has the token at which an answer ends.
        vision: patch sizes, normalisation and token ids of the VLM.
        geometry: patch size of the geometry encoder.
        config: frame size, form of the visual prompt and maximum length.
        cache: feature cache; None if all features are computed.

    Raises:
        ValueError: the tokenizer is not a fast tokenizer or has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: VlmFamily,
        vision: VisionSpec,
        geometry: GeometrySpec,
        config: DataConfig,
        cache: FeatureCache | None = None,
    ) -> None:
        self.tokenizer, self.vision, self.config = tokenizer, vision, config
        self.preprocess = VisualPreprocessor(family, vision, geometry, config, cache)
        self.end_of_turn = family.end_of_turn
        self._templates: dict[int, tuple[str, str]] = {}  # number of frames -> chat text before and after the question
        self._template_tokens: dict[int, int] = {}  # number of frames -> tokens of these texts, placeholders unexpanded
        # Added tokens that are not special, such as whole sentences of a prompt, are ordinary text.
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens = sorted({*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which digit tokens need; "
                "add the tokenizer.json that belongs to the model."
            )
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; the model directory lacks chat_template.jinja.")

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample.

        Args:
            sample: the sample.
            with_answer: True for prompt and answer (training), False for the prompt only (generation).

        Raises:
            ValueError: a frame cannot be read, a text contains a special token, the chat template changes the
                question, or the sequence is longer than `data.max_length`.
        """
        visual = self.preprocess(sample)
        prompt, what = self._prompt(sample, visual.grid_thw)
        answer, answer_tokens = self._answer(sample) if with_answer else ([], None)
        ids = torch.tensor(prompt + answer, dtype=torch.int64)
        self._check_length(sample, len(ids))
        types = torch.zeros_like(ids)
        types[ids == self.vision.image_token_id] = IMAGE
        types[ids == self.vision.video_token_id] = VIDEO
        return Features(
            sample=sample,
            input_ids=ids,
            token_types=types,
            num_answer_tokens=len(answer),
            visual=visual,
            what=torch.tensor(what + [False] * len(answer)),
            answer_tokens=answer_tokens,
        )

    def check(self, sample: Sample, sizes: Sequence[tuple[int, int]], with_answer: bool) -> None:
        """Check the texts and the length of a sample as `__call__` does, without reading frames.

        Args:
            sample: the sample.
            sizes: ``(width, height)`` of each frame file in pixels.
            with_answer: see `__call__`.

        Raises:
            ValueError: see `__call__`.
        """
        self._check_question(sample)
        # One frame is enough to check whether the template changes the question.
        self._prompt_text(sample, min(1, len(sample.frames)))
        answer = sample.answer + self.end_of_turn if with_answer else ""
        if with_answer:
            if not sample.answer:
                raise ValueError(
                    f"Sample {sample.id} of {sample.task} has no answer to train on: it is of a test split, or of a "
                    "validation split where no frame shows its object; train on another data set."
                )
            self._check_special_tokens(sample, sample.answer)
        frames, visual = len(sample.frames), self._added_visual_tokens(sample.frames, sizes)
        if frames not in self._template_tokens:
            self._template_tokens[frames] = sum(self._count(text) for text in self._around(frames))
        # Tokenizing every text is slow. A token has at least one byte, so the number of bytes is an upper bound of the
        # number of tokens; only a text whose bound exceeds the maximum is tokenized.
        bound = self._template_tokens[frames] + len((sample.question + answer).encode()) + visual + MERGE_MARGIN
        if bound > self.config.max_length:
            text, _ = self._prompt_text(sample, frames)
            self._check_length(sample, self._count(text) + self._count(answer) + visual)

    def _added_visual_tokens(self, paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> int:
        """Number of tokens that a prompt grows by when the placeholders of frames of these sizes are expanded."""
        if not sizes:
            return 0
        _, (width, height) = self.preprocess.sizes(paths, sizes)
        side = self.vision.patch_size * self.vision.merge_size  # of a visual token, in pixels
        video = self.config.visual == "video"
        times = -(-len(sizes) // self.vision.temporal_patch_size) if video else len(sizes)
        # One placeholder per video or image becomes its visual tokens.
        return times * (width // side) * (height // side) - (1 if video else times)

    def _count(self, text: str) -> int:
        """Number of tokens of a text."""
        # Not tokenizer(text), which starts threads: they do not survive the fork of the DataLoader workers.
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _prompt(self, sample: Sample, grid_thw: torch.Tensor) -> tuple[list[int], list[bool]]:
        """Token ids of the prompt (system turn, frames, question), and the mask of its *what* tokens."""
        self._check_question(sample)
        text, offset = self._prompt_text(sample, len(sample.frames))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # `sample.what` counts characters of the question, the tokenizer's offsets those of the whole chat text.
        begin, end = sample.what
        what = what_tokens((offset + begin, offset + end), encoded["offset_mapping"]).tolist()
        counts = (grid_thw.prod(-1) // self.vision.merge_size**2).tolist()
        placeholders = {self.vision.image_token_id, self.vision.video_token_id}
        found = sum(i in placeholders for i in encoded["input_ids"])
        if found != len(counts):
            raise ValueError(
                f"The chat template made {found} visual placeholders for {len(counts)} images or videos; "
                "use the tokenizer files that came with the model."
            )
        # Expand every placeholder to one token per merged patch of its image or video.
        remaining = iter(counts)
        repeats = [next(remaining) if i in placeholders else 1 for i in encoded["input_ids"]]
        ids = [i for i, count in zip(encoded["input_ids"], repeats, strict=True) for _ in range(count)]
        return ids, [flag for flag, count in zip(what, repeats, strict=True) for _ in range(count)]

    def _check_question(self, sample: Sample) -> None:
        """Raise ValueError for a special token in the question, or a *what* span that exceeds the question."""
        self._check_special_tokens(sample, sample.question)
        begin, end = sample.what
        if not 0 <= begin <= end <= len(sample.question):
            raise ValueError(
                f"Sample {sample.id}: what is {sample.what}, which is not a span of its question; "
                f"set [begin, end) within its {len(sample.question)} characters."
            )

    def _prompt_text(self, sample: Sample, frames: int) -> tuple[str, int]:
        """The sample's chat text for `frames` frames, and the index of the question's first character in it."""
        text = self._render(frames, sample.question)
        before, after = self._around(frames)
        if text != before + sample.question + after:
            raise ValueError(
                f"Sample {sample.id}: the tokenizer's chat template changes the question {sample.question!r} (does it "
                "strip or escape text?); use the chat_template that came with the model."
            )
        return text, len(before)

    def _around(self, frames: int) -> tuple[str, str]:
        """The chat text before and after the question, for `frames` frames."""
        if frames not in self._templates:
            # Rendered with a placeholder, because a short question may also occur elsewhere in the text. If the
            # template changes even the placeholder, the result matches no text, and `_prompt_text` raises.
            before, found, after = self._render(frames, QUESTION_PLACEHOLDER).rpartition(QUESTION_PLACEHOLDER)
            self._templates[frames] = (before, after) if found else (QUESTION_PLACEHOLDER, QUESTION_PLACEHOLDER)
        return self._templates[frames]

    def _render(self, frames: int, question: str) -> str:
        """The chat text up to the answer, with one placeholder per image or video."""
        content: list[dict[str, str]] = []
        if self.config.visual == "video":
            content += [{"type": "video"}] if frames else []
        else:
            for index in range(frames):
                content += [{"type": "text", "text": f"Frame-{index}: "}, {"type": "image"}]
        content.append({"type": "text", "text": question})
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text

    def _answer(self, sample: Sample) -> tuple[list[int], AnswerTokens]:
        """Token ids of the answer and the end of turn, and the answer's *where* and digit tokens."""
        self._check_special_tokens(sample, sample.answer)
        encoded = self.tokenizer(
            sample.answer + self.end_of_turn, add_special_tokens=False, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"]
        return encoded["input_ids"], find_answer_tokens(sample.kind, sample.answer, offsets, sample.box_format)

    def _check_special_tokens(self, sample: Sample, text: str) -> None:
        """Raise ValueError if a text contains a special token, which would end a turn or shift placeholders."""
        for token in self.special_tokens:
            if token in text:
                raise ValueError(
                    f"Sample {sample.id}: its text contains the special token {token!r}; remove it from the "
                    "annotations and prepare the data set again."
                )

    def _check_length(self, sample: Sample, count: int) -> None:
        """Raise SequenceTooLong for more than `data.max_length` tokens."""
        # A sequence is never truncated: the model would learn answers without an end.
        if count > self.config.max_length:
            raise SequenceTooLong(
                f"Sample {sample.id} has {count} tokens, more than data.max_length = {self.config.max_length}; "
                "raise it or use fewer or smaller frames.",
                count,
            )
