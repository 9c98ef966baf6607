"""Tokenize a sample and preprocess its frames into `Features`; runs in loader workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

STAND_IN = "\ue000"
"""A private character, in no template and no question."""

SEAMS = 64
"""Generously, the tokens that a text may have more than its parts; where they meet at special tokens, none."""


class TooLong(ValueError):
    """A sample has more tokens than `data.max_length`."""

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class Features:
    """One sample as tensors.

    Attributes:
        sample: where it comes from.
        input_ids: ``[tokens]`` int64: prompt, then (when training) the answer and the end of turn.
        token_types: ``[tokens]`` int64, 0 text, 1 image, 2 video.
        answer_tokens: number of trailing tokens that are the answer and its end of turn; 0 for a prompt alone.
        visual: inputs of both encoders, or their cached features.
        what: ``[tokens]`` bool, tokens of the prompt that say what is meant.
        digit_tokens: positions of the answer's digits and numbers; None for a prompt alone.
    """

    sample: Sample
    input_ids: torch.Tensor
    token_types: torch.Tensor
    answer_tokens: int
    visual: VisualInputs
    what: torch.Tensor
    digit_tokens: AnswerTokens | None


class Processor:
    """Turns samples into tensors; equal to the VLM's transformers processor on frames that it need not resize.

    Args:
        tokenizer: the VLM's tokenizer with its chat template.
        family: of the VLM; pixel values and the token at which an answer ends.
        vision: patch sizes, normalisation and token ids of the VLM.
        geometry: patch size of the geometry encoder.
        config: frames, sizes and the form of the visual prompt.
        cache: features that need not be computed; None without a cache.
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
        self._frames: dict[int, tuple[str, str]] = {}
        self._frame_tokens: dict[int, int] = {}
        self.special_tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which digit tokens need; "
                "add the tokenizer.json that belongs to the model."
            )
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; the model directory lacks chat_template.jinja.")

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample, with its answer as label or as a prompt for generation.

        Raises:
            ValueError: a frame cannot be read, text holds a special token, the chat template changes the question, or
                the sequence is longer than `data.max_length`.
        """
        visual = self.preprocess(sample)
        prompt, what = self._prompt(sample, visual.grid_thw)
        answer, digit_tokens = self._answer(sample) if with_answer else ([], None)
        ids = torch.tensor(prompt + answer, dtype=torch.int64)
        self._refuse_too_long(sample, len(ids))
        types = torch.zeros_like(ids)
        types[ids == self.vision.image_token_id] = IMAGE
        types[ids == self.vision.video_token_id] = VIDEO
        return Features(
            sample=sample,
            input_ids=ids,
            token_types=types,
            answer_tokens=len(answer),
            visual=visual,
            what=torch.tensor(what + [False] * len(answer)),
            digit_tokens=digit_tokens,
        )

    def check(self, sample: Sample, sizes: Sequence[tuple[int, int]], with_answer: bool) -> None:
        """Refuse a sample that `__call__` would refuse for its texts or its length, at a small part of the cost.

        Args:
            sample: whose frames are not looked at.
            sizes: width and height of each frame file.
            with_answer: as of `__call__`.

        Raises:
            ValueError: as `__call__` does.
        """
        self._check_question(sample)
        # One frame is enough to see what the template does with the question.
        self._prompt_text(sample, min(1, len(sample.frames)))
        answer = sample.answer + self.end_of_turn if with_answer else ""
        if with_answer:
            self._refuse_special_tokens(sample, sample.answer)
        frames, visual = len(sample.frames), self._visual_tokens(sizes)
        if frames not in self._frame_tokens:
            self._frame_tokens[frames] = sum(self._count(text) for text in self._around(frames))
        # No token is shorter than a byte: most texts need not be encoded.
        most = self._frame_tokens[frames] + len((sample.question + answer).encode()) + visual + SEAMS
        if most > self.config.max_length:
            text, _ = self._prompt_text(sample, frames)
            self._refuse_too_long(sample, self._count(text) + self._count(answer) + visual)

    def _visual_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Visual tokens of frames of these sizes, less the placeholders that stand for them in the text."""
        if not sizes:
            return 0
        _, (width, height) = self.preprocess.sizes(sizes)
        step = self.vision.patch_size * self.vision.merge_size
        video = self.config.visual == "video"
        times = -(-len(sizes) // self.vision.temporal_patch_size) if video else len(sizes)
        return times * (width // step) * (height // step) - (1 if video else times)

    def _count(self, text: str) -> int:
        """Tokens of a text. The library's batch call would start threads, which forked loader workers do not bear."""
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _prompt(self, sample: Sample, grid_thw: torch.Tensor) -> tuple[list[int], list[bool]]:
        """Token ids of system turn, frames and question, and which of them say what is meant.

        Placeholders are expanded to one per merged patch.
        """
        self._check_question(sample)
        first, last = sample.what
        text, begin = self._prompt_text(sample, len(sample.frames))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        what = what_tokens((begin + first, begin + last), encoded["offset_mapping"]).tolist()
        counts = (grid_thw.prod(-1) // self.vision.merge_size**2).tolist()
        placeholders = {self.vision.image_token_id, self.vision.video_token_id}
        found = sum(i in placeholders for i in encoded["input_ids"])
        if found != len(counts):
            raise ValueError(
                f"The chat template made {found} visual placeholders for {len(counts)} images or videos; "
                "use the tokenizer files that came with the model."
            )
        remaining = iter(counts)
        repeats = [next(remaining) if i in placeholders else 1 for i in encoded["input_ids"]]
        ids = [i for i, count in zip(encoded["input_ids"], repeats, strict=True) for _ in range(count)]
        return ids, [flag for flag, count in zip(what, repeats, strict=True) for _ in range(count)]

    def _check_question(self, sample: Sample) -> None:
        """Refuse special tokens in a question, and a *what* outside it."""
        self._refuse_special_tokens(sample, sample.question)
        first, last = sample.what
        if not 0 <= first <= last <= len(sample.question):
            raise ValueError(
                f"Sample {sample.id}: what is {sample.what}, which is no span of its question; "
                f"give [begin, end) within its {len(sample.question)} characters."
            )

    def _prompt_text(self, sample: Sample, frames: int) -> tuple[str, int]:
        """The chat text of a sample as if it had so many frames, and where the question begins in it."""
        text = self._render(frames, sample.question)
        before, after = self._around(frames)
        if text != before + sample.question + after:
            raise ValueError(
                f"Sample {sample.id}: the tokenizer's chat template changes the question {sample.question!r} (does it "
                "strip or escape text?); use the chat_template that came with the model."
            )
        return text, len(before)

    def _around(self, frames: int) -> tuple[str, str]:
        """The chat text before and after a question.

        Found with a stand-in for the question: a short question may occur elsewhere in the text too. A template that
        changes even this leaves nothing to compare with.
        """
        if frames not in self._frames:
            before, found, after = self._render(frames, STAND_IN).rpartition(STAND_IN)
            self._frames[frames] = (before, after) if found else (STAND_IN, STAND_IN)
        return self._frames[frames]

    def _render(self, frames: int, question: str) -> str:
        """The user's turn and the beginning of the assistant's, one placeholder per image or video."""
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
        """Token ids of the answer with its end of turn, and its digit tokens."""
        self._refuse_special_tokens(sample, sample.answer)
        encoded = self.tokenizer(
            sample.answer + self.end_of_turn, add_special_tokens=False, return_offsets_mapping=True
        )
        return encoded["input_ids"], find_answer_tokens(sample.kind, sample.answer, encoded["offset_mapping"])

    def _refuse_special_tokens(self, sample: Sample, text: str) -> None:
        """A description that spells a special token would turn into that token and shift every placeholder."""
        for token in self.special_tokens:
            if token in text:
                raise ValueError(
                    f"Sample {sample.id}: its text holds the special token {token!r}; remove it from the annotations "
                    "and prepare the data set again."
                )

    def _refuse_too_long(self, sample: Sample, count: int) -> None:
        """Nothing is cut: a sequence without its end would teach an answer without one."""
        if count > self.config.max_length:
            raise TooLong(
                f"Sample {sample.id} has {count} tokens, more than data.max_length = {self.config.max_length}; "
                "raise it or use fewer or smaller frames.",
                count,
            )
