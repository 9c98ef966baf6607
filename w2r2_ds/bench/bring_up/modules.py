"""Time of every module of a training step against its roofline: the faster of arithmetic and memory traffic.

The roofline is ``max(FLOPs / matrix rate, bytes / bandwidth)`` with the rates that were measured on the device. A
module far above its roofline runs a slow kernel or waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from w2r2_ds.bench.bring_up.settings import Settings
from w2r2_ds.bench.bring_up.steps import if_it_fits
from w2r2_ds.bench.harness import interleave
from w2r2_ds.bench.model import Subject, build, shape_description
from w2r2_ds.bench.report import BenchReport
from w2r2_ds.bench.shapes import Shape
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.models.flops import Work, attention, products
from w2r2_ds.models.qwen2_5_vl.last_layer import compute_only
from w2r2_ds.models.w2r2 import answer_indices
from w2r2_ds.training.throughput import matrix_rate


@dataclass(frozen=True)
class Target:
    """A module to time.

    Attributes:
        run: forward, or forward and backward.
        flops: FLOPs of `run`.
        bytes: memory traffic of `run`: weights, inputs and outputs, once per pass.
    """

    run: Callable[[], object]
    flops: float
    bytes: float


def run(settings: Settings) -> BenchReport:
    """Time all modules of every shape, with the first number of frames."""
    report = BenchReport("modules", "seconds per call against the roofline", [])
    bandwidth = memory_bandwidth(settings.device)
    for shape in settings.all_shapes():
        # Frees the model: otherwise the memory would have to hold two.
        if_it_fits(partial(measure, shape, settings, bandwidth, report), shape.label, settings.device, report)
    report.notes.append("Encoders: forward. Other modules: forward and backward, without recomputation.")
    return report


def measure(shape: Shape, settings: Settings, bandwidth: float, report: BenchReport) -> None:
    """Add the rows and notes of one shape."""
    rate = matrix_rate(settings.device, resolve_dtype(shape.dtype))
    found = targets(build(shape, settings.device))
    spreads = interleave({name: each.run for name, each in found.items()}, settings.rounds, settings.device, 2)
    for name, target in found.items():
        roofline = max(target.flops / rate, target.bytes / bandwidth)
        seconds = spreads[name].median
        report.rows.append(
            {
                "module": name,
                "shape": shape.label,
                "seconds": seconds,
                "TFLOP/s": target.flops / seconds / 1e12,
                "roofline": roofline,
                "% of roofline": 100 * roofline / seconds,
            }
        )
    report.notes.append(f"matrix rate {rate / 1e12:.3g} TFLOP/s, memory bandwidth {bandwidth / 1e9:.4g} GB/s")
    report.notes.append(shape_description(shape))


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy: of 1 GiB on a GPU, of 64 MiB on a CPU; bytes read and bytes written are counted."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    spread = interleave({"copy": lambda: target.copy_(source)}, 5, device, warmups=1)["copy"]
    return 2 * size / min(spread.seconds)


def targets(subject: Subject) -> dict[str, Target]:
    """Name -> module with inputs of one sample."""
    return encoders(subject) | decoder(subject)


def encoders(subject: Subject) -> dict[str, Target]:
    """Patch embedding, vision tower and VGGT."""
    shape, model, batch = subject.shape, subject.model, subject.batch()
    tower, visuals = model.family.vision_tower(model.base), batch.visuals
    patch_embed: Any = tower.patch_embed
    weight = next(tower.parameters())
    count = shape.frames * shape.grid[0] * shape.grid[1]
    patches = torch.randn(count, patch_embed.proj.weight[0].numel(), device=weight.device, dtype=weight.dtype)
    grids = [(1, shape.grid[1], shape.grid[0])] * shape.frames
    width, height = shape.frame_size
    images = torch.rand(shape.frames, 3, height, width, device=weight.device)
    embedded, visual = (
        count * shape.vision_hidden * weight.itemsize,
        shape.visual_tokens * shape.hidden * weight.itemsize,
    )
    features = 2 * shape.vggt.embed_dim * images[:, 0].numel() // shape.vggt.patch_size**2 * weight.itemsize

    @torch.no_grad()
    def embed() -> Tensor:
        result: Tensor = patch_embed(patches)
        return result

    @torch.no_grad()
    def encode_2d() -> object:
        return model.family.encode_visuals(model.base, visuals)

    return {
        "patch embedding": Target(
            embed, products(patch_embed, count).forward, nbytes(patch_embed) + patches.nbytes + embedded
        ),
        "vision tower": Target(
            encode_2d, model.family.vision_flops(tower, grids), nbytes(tower) + patches.nbytes + visual
        ),
        "VGGT": Target(
            lambda: model.geometry.encode(images),
            model.geometry.flops(shape.frames, height, width),
            nbytes(model.geometry.vggt) + images.nbytes + features,  # type: ignore[attr-defined]
        ),
    }


def decoder(subject: Subject) -> dict[str, Target]:
    """A decoder layer, the last layer at the answer tokens, a LoRA projection, and the LM head."""
    shape, model, batch = subject.shape, subject.model, subject.batch()
    text = model.family.language_model(model.base)
    layer: Any = text.layers[-1]  # without activation checkpointing, see `recompute`
    head = model.base.get_output_embeddings()
    weight = head.weight
    rows, tokens, pairs = shape.answer_tokens, shape.tokens, shape.tokens**2 / 2
    hidden = torch.randn(1, tokens, shape.hidden, device=weight.device, dtype=weight.dtype, requires_grad=True)
    answers = hidden[:, :rows].detach().clone().requires_grad_()
    assert batch.layout is not None, "a training batch has a layout"
    rotary: Any = text.rotary_emb
    positions = rotary(hidden, batch.position_ids)
    selected = SelectedTokens.of(batch.layout, *answer_indices(batch))
    channels, traffic = shape.heads * layer.self_attn.head_dim, hidden.nbytes
    projections = products(layer.self_attn.k_proj, tokens) + products(layer.self_attn.v_proj, tokens)
    others = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
    last = sum((products(each, rows) for each in others), projections) + attention(channels, rows * tokens)
    gate = layer.mlp.gate_proj

    def call(context: AbstractContextManager[object]) -> Tensor:
        with context:
            result: Tensor = layer(hidden, attention_mask=None, position_embeddings=positions)
        return result

    return {
        "decoder layer": trained(
            lambda: call(nullcontext()),
            hidden,
            products(layer, tokens) + attention(channels, pairs),
            layer,
            2 * traffic,
        ),
        "last layer, answer tokens": trained(
            lambda: call(compute_only(layer, selected)), hidden, last, layer, traffic + answers.nbytes
        ),
        "LoRA projection (gate_proj)": trained(
            lambda: gate(hidden),
            hidden,
            products(gate, tokens),
            gate,
            traffic + tokens * shape.intermediate * hidden.itemsize,
        ),
        "LM head, answer tokens": trained(
            lambda: head(answers), answers, products(head, rows), head, answers.nbytes + rows * shape.vocabulary * 2
        ),
    }


def trained(forward: Callable[[], Tensor], inputs: Tensor, work: Work, module: nn.Module, activations: int) -> Target:
    """Forward and backward of a module; the backward pass reads weights and activations once more."""
    leaves = [inputs, *(each for each in module.parameters() if each.requires_grad)]

    def run() -> None:
        output = forward()
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    return Target(run, work.total, 2 * (nbytes(module) + activations))


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
