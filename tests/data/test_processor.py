"""`Processor`: token counts, *what* tokens, and errors of samples and tokenizers."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from w2r2_ds.data import visual_inputs
from w2r2_ds.data.images import input_bytes, load_resized
from w2r2_ds.data.loader import make_processor
from w2r2_ds.data.processor import IMAGE, VIDEO, Processor, SequenceTooLong
from w2r2_ds.demo.tiny_models import CHAT_TEMPLATE


def text_of(frontend: Any, ids: torch.Tensor) -> str:
    return str(frontend.tokenizer.decode(ids, skip_special_tokens=False))


def test_images_have_one_placeholder_per_merged_patch(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    features = make_processor(frontend, data_config())(samples[0], with_answer=True)
    assert features.visual.grid_thw.tolist() == [[1, 2, 4]] * 4  # 56 x 42 pixels, the odd row of patches cropped
    assert features.visual.geometry_frames.shape == (4, 3, 42, 56)  # not cropped
    assert features.visual.geometry_frames.dtype == torch.uint8
    assert features.visual.tower_frames is features.visual.geometry_frames
    assert int((features.input_ids == frontend.vision.image_token_id).sum()) == 4 * 2
    assert torch.equal(features.token_types == IMAGE, features.input_ids == frontend.vision.image_token_id)
    pads = "<|image_pad|>" * 2
    frames = "".join(f"Frame-{i}: <|vision_start|>{pads}<|vision_end|>" for i in range(4))
    assert text_of(frontend, features.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{frames}{samples[0].question}<|im_end|>\n<|im_start|>assistant\n{samples[0].answer}<|im_end|>"
    )


def test_video_has_one_grid_and_pairs_of_frames(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    features = make_processor(frontend, data_config(visual="video"))(samples[1], with_answer=True)
    assert features.visual.grid_thw.tolist() == [[2, 4, 4]]  # three frames are two pairs
    assert len(features.visual.tower_frames) == 3
    assert int((features.input_ids == frontend.vision.video_token_id).sum()) == 2 * 4
    assert torch.equal(features.token_types == VIDEO, features.input_ids == frontend.vision.video_token_id)
    assert "Frame-" not in text_of(frontend, features.input_ids)


@pytest.mark.parametrize("visual", ["images", "video"])
def test_input_bytes(frontend: Any, data_config: Any, samples: list[Any], visual: str) -> None:
    """The size of the frames that a loader process puts into shared memory, once for both encoders."""
    config = data_config(visual=visual)
    for sample in samples:
        inputs = make_processor(frontend, config)(sample, with_answer=True).visual
        assert inputs.tower_frames is inputs.geometry_frames
        assert input_bytes(sample.frames, config) == inputs.geometry_frames.nbytes > 0


def test_prompt_is_the_training_sequence_without_its_answer(
    frontend: Any, data_config: Any, samples: list[Any]
) -> None:
    processor = make_processor(frontend, data_config())
    training, prompt = (processor(samples[2], with_answer) for with_answer in (True, False))
    count = training.num_answer_tokens
    assert torch.equal(training.input_ids[:-count], prompt.input_ids)
    assert text_of(frontend, training.input_ids[-count:]) == samples[2].answer + "<|im_end|>"
    assert training.answer_tokens is not None and len(training.answer_tokens.where) == count
    assert prompt.num_answer_tokens == 0 and prompt.answer_tokens is None


@pytest.mark.parametrize("visual", ["images", "video"])
def test_what_tokens_after_expanded_placeholders(
    frontend: Any, data_config: Any, samples: list[Any], visual: str
) -> None:
    processor = make_processor(frontend, data_config(visual=visual))
    table = "A small brown table beside the white door of the room."
    for sample, description in zip(samples, ["The red chair.", table, "The sofa."], strict=True):
        features = processor(sample, with_answer=True)
        at = features.what.nonzero().squeeze(-1)
        assert len(features.what) == len(features.input_ids) and torch.equal(at, torch.arange(at[0], at[-1] + 1))
        assert text_of(frontend, features.input_ids[at]).strip() == description
        before = text_of(frontend, features.input_ids[: at[0]]).rstrip(" ")
        assert before.endswith("<|vision_end|>" + sample.question[: sample.what[0]].rstrip(" "))
        assert text_of(frontend, features.input_ids[at[-1] + 1 :]).startswith("Output a JSON dictionary")
        prompt = processor(sample, with_answer=False)
        assert torch.equal(prompt.what, features.what[: len(prompt.what)])


def test_what_tokens_of_a_question_text_that_occurs_twice(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    """`a`, `assistant` and `Frame-0: ` occur in the chat template or before a frame too; the last occurrence counts."""
    processor = make_processor(frontend, data_config())
    for question, what, chosen in [
        ("a", (0, 1), "a"),
        ("assistant", (0, 9), "assistant"),
        ("Frame-0: ", (0, 5), "Frame"),
        ("chair, chair", (7, 12), " chair"),
    ]:
        features = processor(replace(samples[0], question=question, what=what), with_answer=False)
        at = features.what.nonzero().squeeze(-1)
        assert text_of(frontend, features.input_ids[at]) == chosen
        after = text_of(frontend, features.input_ids[at[0] :])
        begin = question[what[0] :] if chosen[0] != " " else question[what[0] - 1 :]
        assert after == begin + "<|im_end|>\n<|im_start|>assistant\n"


def test_no_what_tokens_without_a_description(
    frontend: Any, data_config: Any, caption_sample: Any, answer_sample: Any
) -> None:
    for sample in (caption_sample, answer_sample):
        features = make_processor(frontend, data_config())(sample, with_answer=True)
        assert features.what.dtype == torch.bool and not features.what.any()
        assert features.answer_tokens is not None
        assert features.answer_tokens.where.tolist() == [True] * (features.num_answer_tokens - 1) + [False]
        assert text_of(frontend, features.input_ids[-features.num_answer_tokens :]) == sample.answer + "<|im_end|>"


@pytest.mark.parametrize("what", [(-1, 2), (3, 2), (0, 10_000)])
def test_a_what_span_outside_the_question_raises(
    frontend: Any, data_config: Any, samples: list[Any], what: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"Sample four: what is \(.*\), which is not a span of its question"):
        make_processor(frontend, data_config())(replace(samples[0], what=what), with_answer=True)


@pytest.mark.parametrize("visual", ["images", "video"])
def test_a_sample_without_frames(frontend: Any, data_config: Any, text_samples: list[Any], visual: str) -> None:
    processor = make_processor(frontend, data_config(visual=visual))
    for sample in text_samples:
        features = processor(sample, with_answer=True)
        assert text_of(frontend, features.input_ids) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{sample.question}<|im_end|>\n<|im_start|>assistant\n{sample.answer}<|im_end|>"
        )
        assert features.visual.tower_frames is None
        assert features.visual.grid_thw.shape == (0, 3) and features.visual.grid_thw.dtype == torch.int64
        assert features.visual.geometry_frames is None and not features.token_types.any()
    assert text_of(frontend, features.input_ids[features.what]).strip() == "The sofa."


def test_added_tokens_that_are_not_special_are_text(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    """A sentence of the prompt as one token; only special added tokens must not be in a text."""
    tokenizer = copy.deepcopy(frontend.tokenizer)
    sentence, mark = samples[0].question[: samples[0].what[0]].rstrip(), "<|mark|>"
    tokenizer.add_tokens([AddedToken(sentence, normalized=False, special=False)])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True)])
    short = make_processor(replace(frontend, tokenizer=tokenizer), data_config())
    plain = make_processor(frontend, data_config())(samples[0], True)
    features = short(samples[0], True)
    words = len(frontend.tokenizer(sentence, add_special_tokens=False)["input_ids"])
    assert words > 5 and len(features.input_ids) == len(plain.input_ids) - words + 1
    assert tokenizer.decode(features.input_ids[features.what]) == text_of(frontend, plain.input_ids[plain.what])
    short.check(samples[0], [(56, 56)] * len(samples[0].frames), True)
    with pytest.raises(ValueError, match=r"Sample four: .*special token '<\|mark\|>'"):
        short(replace(samples[0], answer=mark), with_answer=True)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>"])
def test_special_tokens_in_the_description(frontend: Any, data_config: Any, samples: list[Any], token: str) -> None:
    processor = make_processor(frontend, data_config())
    with pytest.raises(ValueError, match=r"Sample four: .*special token"):
        processor(replace(samples[0], question=f"where is {token}?"), with_answer=False)
    with pytest.raises(ValueError, match=r"Sample four: .*special token"):
        processor(replace(samples[0], answer=samples[0].answer + token), with_answer=True)


def test_a_too_long_sample_raises_with_id_and_limit(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"Sample four has \d+ tokens, more than data.max_length = 100"):
        make_processor(frontend, data_config(max_length=100))(samples[0], with_answer=True)


def test_missing_and_broken_frames_raise_with_their_path(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path
) -> None:
    processor = make_processor(frontend, data_config())
    frames = samples[0].frames
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist"):
        processor(replace(samples[0], frames=(*frames[:3], tmp_path / "gone.jpg")), with_answer=True)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        processor(replace(samples[0], frames=(*frames[:3], broken)), with_answer=True)


def test_width_must_be_a_multiple_of_the_patch(frontend: Any, data_config: Any) -> None:
    with pytest.raises(ValueError, match=r"data.frame_width is 60; .* 14"):
        make_processor(frontend, data_config(frame_width=60))


def test_frames_smaller_than_a_merged_patch(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    with pytest.raises(ValueError, match="smaller than one merged patch"):
        make_processor(frontend, data_config(frame_width=14))(samples[0], with_answer=True)


def test_frames_of_odd_and_unequal_sizes(frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path) -> None:
    paths = []
    for index, size in enumerate([(83, 61), (47, 61)]):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8)).save(paths[-1])
    odd = replace(samples[0], frames=tuple(paths), cam_to_world=samples[0].cam_to_world[:2])
    features = make_processor(frontend, data_config())(odd, with_answer=False)
    # 56 x 42 and 56 x 56 (cut): the first is padded to the second.
    assert features.visual.geometry_frames.shape == (2, 3, 56, 56)
    assert features.visual.grid_thw.tolist() == [[1, 4, 4]] * 2
    assert features.visual.geometry_frames[0, :, 0].min() == 255 and features.visual.geometry_frames[1].max() < 255


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("size", [(83, 61), (47, 61)])
def test_padded_frames_are_square(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path, size: tuple[int, int], visual: str
) -> None:
    path = tmp_path / "frame.png"
    Image.new("RGB", size).save(path)
    sample = replace(samples[0], frames=(path,) * 2, cam_to_world=samples[0].cam_to_world[:2])
    processor = make_processor(frontend, data_config(frame_fit="pad", visual=visual))
    features = processor(sample, with_answer=False)
    assert features.visual.geometry_frames.shape == (2, 3, 56, 56)
    assert features.visual.grid_thw.tolist() == ([[1, 4, 4]] * 2 if visual == "images" else [[1, 4, 4]])
    processor.config.max_length = len(features.input_ids) - 1
    with pytest.raises(SequenceTooLong) as caught:  # the length that follows from the header
        processor.check(sample, [size] * 2, with_answer=False)
    assert caught.value.tokens == len(features.input_ids)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_frames_are_decoded_on_threads_in_order(
    frontend: Any, data_config: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    sample = samples[2]
    assert len(sample.frames) == 12
    expected = np.stack([load_resized(path, 56, 14) for path in sample.frames]).transpose(0, 3, 1, 2)
    running: list[int] = []
    lock, reached = threading.Lock(), threading.Barrier(min(threads, 12))

    def load(path: Path, *fit: Any) -> np.ndarray:
        with lock:
            running.append(threading.get_ident())
        if len(running) <= reached.parties:
            reached.wait(60)  # until all threads have a frame
        return load_resized(path, *fit)

    monkeypatch.setattr(visual_inputs, "load_resized", load)
    inputs = make_processor(frontend, data_config(decode_threads=threads))(sample, with_answer=True).visual
    np.testing.assert_array_equal(inputs.tower_frames.numpy(), expected)
    assert len(set(running)) == min(threads, 12)


def test_the_first_of_several_bad_frames_is_named(
    frontend: Any, data_config: Any, samples: list[Any], tmp_path: Path
) -> None:
    bad = [tmp_path / f"{index}.jpg" for index in range(8)]
    processor = make_processor(frontend, data_config(decode_threads=4))
    with pytest.raises(ValueError, match=str(bad[0])):
        processor(replace(samples[0], frames=(*samples[0].frames, *bad)), with_answer=True)


def test_by_default_workers_share_the_cores(frontend: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for workers, threads in ((0, 12), (4, 3), (100, 1)):
        assert make_processor(frontend, data_config(workers=workers)).preprocess.threads == threads
    assert make_processor(frontend, data_config(workers=4, decode_threads=7)).preprocess.threads == 7


class Tokenizer:
    """The tiny tokenizer with another chat template."""

    def __init__(self, inner: Any, chat_template: str | None) -> None:
        self.inner, self.chat_template = inner, chat_template

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.inner.apply_chat_template(messages, chat_template=self.chat_template, **options)


@pytest.mark.parametrize("token", ["<|an_image|>", ""])
def test_a_tokenizer_without_vision_tokens_raises(
    frontend: Any, data_config: Any, samples: list[Any], token: str
) -> None:
    tokenizer = Tokenizer(frontend.tokenizer, CHAT_TEMPLATE.replace("<|image_pad|>", token))
    with pytest.raises(ValueError, match="made 0 visual placeholders for 4 images"):
        Processor(tokenizer, frontend.family, frontend.vision, frontend.geometry, data_config())(
            samples[0], with_answer=True
        )


@pytest.mark.parametrize("rewrite", ["part['text'] | trim", "part['text'] | e", "part['text'] | lower", "'?'"])
def test_a_template_that_changes_the_question_raises(
    frontend: Any, data_config: Any, samples: list[Any], rewrite: str
) -> None:
    template = CHAT_TEMPLATE.replace("{{- part['text'] -}}", "{{- " + rewrite + " -}}")
    assert template != CHAT_TEMPLATE
    processor = Processor(
        Tokenizer(frontend.tokenizer, template), frontend.family, frontend.vision, frontend.geometry, data_config()
    )
    with pytest.raises(ValueError, match=r"Sample four: the tokenizer's chat template changes the question 'Localize"):
        processor(samples[0], with_answer=True)


def test_a_tokenizer_without_offsets_raises(frontend: Any, data_config: Any) -> None:
    class Slow(Tokenizer):
        is_fast = False

    with pytest.raises(ValueError, match=r"Slow gives no character offsets, .* add the tokenizer\.json"):
        Processor(
            Slow(frontend.tokenizer, CHAT_TEMPLATE), frontend.family, frontend.vision, frontend.geometry, data_config()
        )


def test_a_tokenizer_without_chat_template_raises(frontend: Any, data_config: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Processor(
            Tokenizer(frontend.tokenizer, None), frontend.family, frontend.vision, frontend.geometry, data_config()
        )
