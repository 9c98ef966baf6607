"""Peak memory of a training step of the benchmarks, without ZeRO: predicted from shapes, and measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from w2r2_ds.bench.harness import peak_bytes
from w2r2_ds.bench.model import Subject
from w2r2_ds.models.build import trainable


def measured_bytes(subject: Subject, step: Callable[[], object]) -> int:
    """Peak bytes of a step: allocated on the GPU; on a CPU the weights, and by how much the resident memory grows.

    The resident memory is a rough measure: the C library may keep and reuse memory that was freed before.

    Args:
        subject: model of the step.
        step: a training step with its optimizer; the optimizer states exist.
    """
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    states = 2 * sum(each.nbytes for each in trainable(subject.model).values())  # of AdamW, made by an earlier step
    return weight_bytes(subject) + states + peak_bytes(step)


def weight_bytes(subject: Subject) -> int:
    """Bytes of all weights; tied weights count once."""
    weights = [*subject.model.parameters(), *subject.model.geometry.vggt.parameters()]  # type: ignore[attr-defined]
    return sum({id(each): each.nbytes for each in weights}.values())


def step_bytes(subject: Subject, questions: int) -> int:
    """Bytes of weights, optimizer, saved layer inputs, and of the largest module that runs on top of them.

    Args:
        subject: model and sizes of a sample.
        questions: number of questions in a packed sequence.
    """
    model, shape = subject.model, subject.shape
    suffix = shape.tokens - shape.prefix_tokens
    tokens, rows = shape.prefix_tokens + questions * suffix, questions * shape.answer_tokens
    weight = model.base.get_output_embeddings().weight
    size = weight.element_size()
    trained = sum(each.nbytes for each in trainable(model).values())
    # Activation checkpointing keeps the input of every layer.
    inputs = shape.layers * tokens * shape.hidden * size
    # A recomputed layer with its gradients: input, two norms, query, attention and output projection of the hidden
    # size; key and value; gate, up and their product.
    head = shape.hidden // shape.heads
    layer = 2 * tokens * (6 * shape.hidden + 2 * shape.kv_heads * head + 3 * shape.intermediate) * size
    # Logits of the answer tokens in the dtype of the weights, and their log-softmax and its gradient in float32, for
    # both passes.
    logits = 2 * rows * shape.vocabulary * (size + 8)
    return weight_bytes(subject) + 3 * trained + inputs + max(layer, logits, vggt_bytes(subject))


def vggt_bytes(subject: Subject) -> int:
    """Bytes of the activations of one global block of VGGT, which has no gradient."""
    shape = subject.shape
    width, height = shape.frame_size
    patch = shape.vggt.patch_size
    tokens = shape.frames * ((width // patch) * (height // patch) + shape.vggt.special_tokens)
    # Residual, norm, query, key, value, output (6 x width), and the MLP's hidden layer twice, before and after GELU
    # (8 x width).
    return 14 * tokens * shape.vggt.embed_dim * next(subject.model.base.parameters()).element_size()
