"""Rank script of test_zero3.py: compare a training step under ZeRO-3 with the step of the unsharded model, per case.

`work` reads ``FOLDER/cases.pkl`` and writes ``FOLDER/rankN.json``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import pickle
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from objectives import objective_config
from w2r2_ds.bench.zero3_gathers import count_gathers, fused_pass_only

CASE_LIMIT = 180
"""Seconds until a case fails, e.g. by a deadlock. An idle machine needs 2 s."""


@dataclass(frozen=True)
class Case:
    """One configuration, and the samples of each rank.

    Attributes:
        name: name in the results.
        ranks: per rank, the micro-batches of one optimizer step, each a list of sample ids.
        objective: changes of the objective.
        model: changes of the model configuration.
        checkpointing: use activation checkpointing.
        visual: images or video.
        steps: number of optimizer steps. The gradients of the last are compared; the learning rate is negligible.
        pass_order: `train.pass_order`, or "single": without shortcut pass, which then has the fused pass's states.
        full: all weights of the language model are trainable.
        zero: changes of DeepSpeed's section `zero_optimization`.
    """

    name: str
    ranks: list[list[list[str]]]
    objective: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    visual: str = "images"
    steps: int = 1
    pass_order: str = "auto"
    full: bool = False
    zero: dict[str, Any] = field(default_factory=dict)


def step_config(case: Case, model_config: Any) -> Any:
    """The run configuration of a case."""
    from w2r2_ds.config.schema import DataConfig, RunConfig, TrainConfig

    micro = max(len(batch) for rank in case.ranks for batch in rank)
    return RunConfig(
        data=DataConfig(frame_width=56, max_length=512, workers=0, visual=case.visual),  # type: ignore[arg-type]
        model=replace(model_config, **case.model),
        objective=objective_config(**case.objective),
        train=TrainConfig(
            micro_batch=micro,
            global_batch=micro * len(case.ranks) * len(case.ranks[0]),
            activation_checkpointing=case.checkpointing,
            pass_order="auto" if case.pass_order == "single" else case.pass_order,  # type: ignore[arg-type]
            lr=1e-30,
            merger_lr=1e-30,
            steps=10,
        ),
    )


def unfreeze(model: Any) -> None:
    """Make all weights of the language model trainable."""
    for module in (model.base.model.language_model, model.base.lm_head):
        module.requires_grad_(True)


def perturb_trainable(model: Any) -> None:
    """Add noise to LoRA B, merger and fusion weights, which are zero or small at initialisation."""
    import torch

    from w2r2_ds.models.build import trainable

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name or "geometry_merger.mlp" in name or "fusion." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def fixed_similarity(scale: dict[str, float]) -> Iterator[None]:
    """Replace the score s of the shortcut's teacher-forced answers, by sample id; a random model has s = 0."""
    import torch

    from w2r2_ds.objective.scorer import Score, Scorer

    stock = Scorer.teacher_forced

    def teacher_forced(self: Any, predicted: Any, batch: Any) -> Score:
        s = torch.tensor([scale[sample_id] for sample_id in batch.ids], dtype=torch.float64)
        return Score(s, torch.ones_like(s, dtype=torch.bool))

    Scorer.teacher_forced = teacher_forced  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scorer.teacher_forced = stock  # type: ignore[method-assign]


def batches_of(case: Case, rank: int, samples: dict[str, Any], frontend: Any, config: Any) -> list[Any]:
    """The micro-batches of a rank. Anchors need the file of `anchor_batches.write_intrinsic`."""
    from anchor_batches import TYPICAL
    from w2r2_ds.data.loader import make_collate, make_processor

    typical = TYPICAL if config.objective.shortcut_decode == "anchor" else None
    collate = make_collate(frontend, config.data, with_prompts=True, typical=typical)
    processor = make_processor(frontend, config.data)
    return [collate([processor(samples[name], True) for name in names]) for names in case.ranks[rank]]


@functools.cache
def whole_model(full: bool, options: str) -> Any:
    """The unsharded model of `options` (JSON), shared by cases that differ in the objective only. It is not updated."""
    import torch

    from w2r2_ds.config.io import model_from_tree
    from w2r2_ds.models.build import build_model

    model = build_model(model_from_tree(json.loads(options), "the case"), torch.device("cpu"), 1)
    perturb_trainable(model)
    if full:
        unfreeze(model)
    model.base.enable_input_require_grads()
    return model


def whole_gradients(case: Case, config: Any, frontend: Any, samples: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Gradients of the mean loss over all samples on the unsharded model, and the statistics of all samples."""
    import torch

    from w2r2_ds.data.answer_tokens import token_tables
    from w2r2_ds.models.build import trainable
    from w2r2_ds.objective.scorer import Scorer
    from w2r2_ds.training.step import W2R2Step

    model = whole_model(case.full, json.dumps(asdict(config.model)))
    model.zero_grad()
    tables = token_tables(frontend.tokenizer, model.base.config.get_text_config().vocab_size)
    step = W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()
    if case.pass_order == "single":
        step.run_passes = functools.partial(fused_pass_only, model)
    stats = []
    for rank in range(len(case.ranks)):
        for batch in batches_of(case, rank, samples, frontend, config):
            loss, sample_stats = step(batch)
            (loss / count(case)).backward()
            stats.append(sample_stats)
    return {n: p.grad for n, p in trainable(model).items()}, torch.cat(stats)


def expectations(
    cases: Sequence[Case], model_config: Any, samples: dict[str, Any], scale: dict[str, float] | None
) -> Iterator[tuple[dict[str, Any], Any]]:
    """`whole_gradients` of every case. Each rank computes every n-th case, and the results are exchanged.

    Cases that decode are computed by all ranks, because greedy decoding has a collective per token.
    """
    import torch.distributed as dist

    ranks = dist.get_world_size()
    for start in range(0, len(cases), ranks):
        own, found = cases[start : start + ranks], None
        for index, case in enumerate(own):
            if index != dist.get_rank() and case.objective.get("shortcut_decode") != "greedy":
                continue
            config = step_config(case, model_config)
            with similarity_of(case, scale):
                result = whole_gradients(
                    case, config, cached_frontend(config.model.vlm, config.model.geometry.path), samples
                )
            found = result if index == dist.get_rank() else found
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, found)
        yield from gathered[: len(own)]


def similarity_of(case: Case, scale: dict[str, float] | None) -> contextlib.AbstractContextManager[None]:
    """`fixed_similarity`, unless `scale` is None or the case computes the decode gap, which needs real scores."""
    return (
        contextlib.nullcontext() if scale is None or case.objective.get("decode_gap_every") else fixed_similarity(scale)
    )


@functools.cache
def cached_frontend(vlm: str, geometry: str) -> Any:
    """Frontend of a VLM, loaded once for all cases."""
    from w2r2_ds.config.schema import GeometryConfig, ModelConfig
    from w2r2_ds.models.build import load_frontend

    return load_frontend(ModelConfig(vlm=vlm, geometry=GeometryConfig(path=geometry, layers=[0])))


def count(case: Case) -> int:
    """Number of samples of an optimizer step."""
    return sum(len(batch) for rank in case.ranks for batch in rank)


def sharded_gradients(
    case: Case, config: Any, frontend: Any, samples: dict[str, Any], ds_config: dict[str, Any]
) -> tuple[dict[str, Any], Any, dict[str, float], Any, list[int]]:
    """A training step under ZeRO-3 with the package's engine.

    Returns:
        Full gradients, statistics of this rank's samples, norms per parameter group, the decode gap or None, and the
        distinct numbers of gathers per decoder-layer parameter in the last step.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    from w2r2_ds.models.build import build_model, trainable
    from w2r2_ds.training.deepspeed.engine import make_engine
    from w2r2_ds.training.deepspeed.gradient_norms import group_norms
    from w2r2_ds.training.optimizer import trained_groups

    world, device = dist.get_world_size(), torch.device("cpu")
    keep_alive = HfDeepSpeedConfig(ds_config)
    model = build_model(config.model, device, 1)
    perturb_trainable(model)  # trainable parameters are not partitioned before the engine is created
    if case.full:
        unfreeze(model)
    engine = make_engine(model, frontend, config, ds_config, device)
    if case.pass_order == "single":
        engine.module.run_passes = functools.partial(fused_pass_only, model)
    del keep_alive
    batches = batches_of(case, dist.get_rank(), samples, frontend, config)
    scale = len(batches) * world / count(case)
    for step in range(case.steps):
        print_on_rank_zero(f"step {step} of {case.name}")
        stats = []
        for index, batch in enumerate(batches):
            with count_gathers(model.base.model.language_model) as counts:
                loss, sample_stats = engine(batch)
                engine.backward(loss * scale)
            stats.append(sample_stats)
            if index + 1 == len(batches):
                gradients = {n: safe_get_full_grad(p).clone() for n, p in trainable(model).items()}
                norms = group_norms(engine, trained_groups(model), device)
            engine.step()
    norms["grad_norm"] = float(engine.get_global_grad_norm())
    decode_gap = None
    if case.objective.get("decode_gap_every"):
        from w2r2_ds.training.decode_gap import DecodeGap

        decode_gap = DecodeGap(list(samples.values())[:3], frontend, config, device).measure(engine)
    engine.destroy()
    return gradients, torch.cat(stats), norms, decode_gap, sorted(set(counts.layers.values()))


def compare(
    case: Case,
    model_config: Any,
    samples: dict[str, Any],
    ds_config: dict[str, Any],
    expected: dict[str, Any],
    all_stats: Any,
) -> dict[str, Any]:
    """Values for the test's assertions: largest relative gradient difference, statistics, norms, gathers."""
    import torch
    import torch.distributed as dist

    from w2r2_ds.objective.loss import STATS
    from w2r2_ds.training.deepspeed.config import resolve_ds_config

    config = step_config(case, model_config)
    frontend = cached_frontend(config.model.vlm, config.model.geometry.path)
    sizes = {"global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch}
    ds_config = ds_config | {"zero_optimization": ds_config["zero_optimization"] | case.zero}
    resolved = resolve_ds_config(
        ds_config, path="zero3_cases.py", world_size=dist.get_world_size(), bf16=False, **sizes
    )
    actual, stats, norms, decode_gap, gather_counts = sharded_gradients(case, config, frontend, samples, resolved)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, stats)
    assert actual.keys() == expected.keys()
    worst, without_gradient = 0.0, []
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            without_gradient.append(name)
            assert not actual[name].any(), f"{name} has a gradient only under ZeRO-3"
            continue
        worst = max(worst, float((actual[name] - gradient).norm() / gradient.norm()))
    squares = {"lora": 0.0, "geometry": 0.0}
    for name, gradient in expected.items():
        squares["geometry" if "geometry_merger" in name or "fusion" in name else "lora"] += (
            0.0 if gradient is None else float(gradient.square().sum())
        )
    return {
        "worst": worst,
        "without_gradient": without_gradient,
        "stats": dict(zip(STATS, torch.cat(gathered).T.tolist(), strict=True)),
        "stats_worst": float((torch.cat(gathered) - all_stats).abs().max()),
        "norms": norms,
        "expected_norms": {f"grad_norm_{name}": value**0.5 for name, value in squares.items()},
        "decode_gap": decode_gap,
        "gathers": gather_counts,
    }


def print_on_rank_zero(text: str) -> None:
    """Print a line on rank 0 that stands out from DeepSpeed's log."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(f"\n== {text}", flush=True)


def work(folder: Path) -> None:
    """Entry point of a rank: run all cases and write their results."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from w2r2_ds.training.deepspeed.process_group import skip_shm_build

    torch.set_num_threads(1)
    skip_shm_build()
    deepspeed.init_distributed()
    cases, model_config, samples, ds_config, scale = pickle.loads((folder / "cases.pkl").read_bytes())
    results = {}
    expected = expectations(cases, model_config, samples, scale)
    for case in cases:
        signal.alarm(CASE_LIMIT)  # SIGALRM kills this rank; `fork_ranks` then kills the other
        gradients, stats = next(expected)
        with similarity_of(case, scale):
            results[case.name] = compare(case, model_config, samples, ds_config, gradients, stats)
        signal.alarm(0)
        gc.collect()
        gc.freeze()  # remaining objects are never freed; DeepSpeed's collections then skip them
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def write_cases(
    folder: Path,
    cases: Sequence[Case],
    model_config: Any,
    samples: dict[str, Any],
    ds_config: dict[str, Any],
    scale: dict[str, float] | None,
) -> None:
    """Write the input of `work`.

    Args:
        scale: sample id -> score s of the shortcut's answer; None for the computed scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert len({case.name for case in cases}) == len(cases), [asdict(case) for case in cases]
    (folder / "cases.pkl").write_bytes(pickle.dumps((list(cases), model_config, samples, ds_config, scale)))
