"""Throughput of a run: samples and tokens per second, model FLOP/s, and MFU against the measured matrix rate.

*Model* FLOPs of the W2R2 step, counted by the conventions of `models/flops.py`. Only necessary work counts: no
recomputation (with activation checkpointing, MFU is therefore lower than the device's real utilisation), no logits of
the prompt, no unused rows of the last layer, no padding, a shared prefix once, no tower whose features are cached.

The shortcut pass counts forward only (with `unblocked`, backward too). Not counted: the attention of the
`cross_attention` fusion (below 0.1 %), the attention weights of `shortcut_decode: anchor`, and greedy decoding in
training (`shortcut_decode: greedy`, `decode_gap_every`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from w2r2_ds.models.flops import Work, products, tokens_and_pairs
from w2r2_ds.models.geometry.encoder import GeometryEncoder
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.push_terms import PushTerm
from w2r2_ds.types.batch import Batch, Visuals

RATE_SECONDS = 0.2
"""Duration of the measurement at the start of a run."""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a matrix product on this device: the fastest product within `RATE_SECONDS`.

    The matrices are 8192 x 8192 on a GPU (0.4 GB in all), and 1024 x 1024 on a CPU, with the threads of this process.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    # Random values, not ones: constant bits take less power, so a GPU would have a higher clock rate than in a run. A
    # separate generator keeps the run's random state unchanged.
    drawn = torch.Generator(device).manual_seed(0)
    left, right, product = (torch.randn(size, size, generator=drawn, device=device, dtype=dtype) for _ in range(3))
    wait = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < RATE_SECONDS:
        wait()
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        wait()
        times.append(time.perf_counter() - started)
    del left, right, product
    if cuda:  # not the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * size**3 / min(times)


class Throughput:
    """Speed of an optimizer step over all ranks, extrapolated from this rank's batches.

    Args:
        model: the composed model, sharded or whole.
        push_term: push term of the run, which determines whether the shortcut has a backward pass and which hidden
            states are computed.
        rate: result of `matrix_rate`.
    """

    def __init__(self, model: W2R2, push_term: PushTerm, rate: float) -> None:
        self.model, self.push_term, self.rate = model, push_term, rate

    def __call__(self, micro_batches: Sequence[Batch], seconds: float) -> dict[str, float]:
        """Metrics of one optimizer step, without a host-device synchronisation.

        Args:
            micro_batches: micro-batches of this rank, on the CPU.
            seconds: duration of the step, data loading included.
        """
        world = dist.get_world_size()
        samples = sum(len(batch.ids) for batch in micro_batches) * world
        tokens = sum(ends[-1] - ends[0] for batch in micro_batches for ends in groups(batch)) * world
        work = sum(step_flops(self.model, self.push_term, batch) for batch in micro_batches) / seconds
        return {
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "tflops": work / 1e12,
            "mfu": work / self.rate,
        }


def groups(batch: Batch) -> Iterable[tuple[int, ...]]:
    """Spans of every group of samples with a shared prefix: begin and end of the prefix, then the ends of suffixes."""
    assert batch.layout is not None, "a training batch has a layout"
    return (ends for spans in batch.layout.spans for ends in spans)


def step_flops(model: W2R2, push_term: PushTerm, batch: Batch) -> float:
    """Model FLOPs of forward and backward of one micro-batch."""
    towers = vision_flops(model, batch.visuals) + geometry_flops(model.geometry, batch.visuals)
    return towers + merger_flops(model, batch.visuals, push_term) + language_flops(model, push_term, batch)


def language_flops(model: W2R2, push_term: PushTerm, batch: Batch) -> float:
    """Model FLOPs of the language model and its head, both passes."""
    tokens, pairs = tokens_and_pairs(groups(batch))
    answer_tokens = len(batch.answer_positions.label)
    # Tokens for which the last decoder layer is computed.
    last = answer_tokens + (len(batch.description_positions.position) if push_term.needs_states else 0)
    # Approximation: such a token attends to as many tokens as the average token.
    linear, attention = model.family.decoder_flops(model.base, tokens, pairs, last, last * pairs / max(tokens, 1))
    work = linear + attention + products(model.base.get_output_embeddings(), answer_tokens)
    return work.total + (work.forward if push_term.stop_gradient else work.total)


def vision_flops(model: W2R2, visuals: Visuals) -> float:
    """Forward FLOPs of the frozen vision tower on the frames whose features are not cached."""
    given = [each for each in visuals.uncached if each is not None] if visuals.cached_2d else [visuals]
    tower = model.family.vision_tower(model.base)
    return sum(model.family.vision_flops(tower, each.grid_thw.tolist()) for each in given)


def merger_flops(model: W2R2, visuals: Visuals, push_term: PushTerm) -> float:
    """Model FLOPs of the geometry merger and the fusion, in each pass that runs them."""
    tokens = sum(visuals.sizes)
    merger, fusion = products(model.geometry_merger, tokens), products(model.fusion, tokens)
    # The shortcut runs the merger on zero features, and the fusion unless Phi(F2D, 0) is F2D. With the geometry of
    # another scene it runs the fusion only: the merger's output is that of the fused pass.
    short, zero_features = Work(), model.zero_geometry == "features" and not push_term.needs_other_geometry
    if zero_features:
        short = short + merger
    if zero_features or push_term.needs_other_geometry or not model.fusion.zero_is_stock:
        short = short + fusion
    return merger.total + fusion.total + (short.forward if push_term.stop_gradient else short.total)


def geometry_flops(encoder: GeometryEncoder, visuals: Visuals) -> float:
    """Forward FLOPs of the geometry encoder on the frame sets that are not cached."""
    shapes = (frames.shape for frames in visuals.geometry_frames if frames is not None)
    return sum(encoder.flops(shape[0], *encoder.spec.frame_size(shape)) for shape in shapes)
