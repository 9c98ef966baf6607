"""Rank script of test_zero3.py: the step under ZeRO-3 against the same step on an unsharded model, case by case.

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
from two_pass_tools import unfreeze
from w2r2_ds.bench.zero3_gathers import count_gathers, fused_pass_only

CASE_LIMIT = 180
"""Seconds; a hang of two ranks is an error. An idle machine needs 2 s, but it may be busy."""


@dataclass(frozen=True)
class Case:
    """One configuration and what each rank is given.

    Attributes:
        name: of the case.
        ranks: per rank the micro-batches of one optimizer step, each a list of sample ids.
        objective, model, train: changes of the configuration.
        visual: images or video.
        steps: optimizer steps; gradients are those of the last, with a learning rate that moves nothing.
        pass_order: of the two passes; "single" leaves the shortcut's out, which then has the fused pass's states.
        full: the language model's weights train, too.
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


def awaken(model: Any) -> None:
    """Trained weights that do something: fresh LoRA pairs are silent, and the merger is nearly so."""
    import torch

    from w2r2_ds.models.build import trainable

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name or "geometry_merger.mlp" in name or "fusion." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def similar(scale: dict[str, float]) -> Iterator[None]:
    """Say how good the shortcut's teacher-forced answers are, by sample id: a random model solves nothing."""
    import torch

    from w2r2_ds.objective.scorer import Score, Scorer

    saved = Scorer.teacher

    def teacher(self: Any, predicted: Any, batch: Any) -> Score:
        s = torch.tensor([scale[identity] for identity in batch.ids], dtype=torch.float64)
        return Score(s, torch.ones_like(s, dtype=torch.bool))

    Scorer.teacher = teacher  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scorer.teacher = saved  # type: ignore[method-assign]


def batches_of(case: Case, rank: int, samples: dict[str, Any], frontend: Any, config: Any) -> list[Any]:
    """The micro-batches of a rank."""
    from w2r2_ds.data.loader import make_collate, make_processor

    collate = make_collate(frontend, config.data, with_prompts=True)
    processor = make_processor(frontend, config.data)
    return [collate([processor(samples[name], True) for name in names]) for names in case.ranks[rank]]


@functools.cache
def whole_model(full: bool, options: str) -> Any:
    """The model of some options (JSON), shared by all cases that differ in the objective alone; nothing steps it."""
    import torch

    from w2r2_ds.config.io import model_from_tree
    from w2r2_ds.models.build import build_model

    model = build_model(model_from_tree(json.loads(options), "the case"), torch.device("cpu"), 1)
    awaken(model)
    if full:
        unfreeze(model)
    model.base.enable_input_require_grads()
    return model


def whole_gradients(case: Case, config: Any, frontend: Any, samples: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Gradients of the mean over all samples on one unsharded model, and the statistics of all batches."""
    import torch

    from w2r2_ds.data.answer_tokens import token_tables
    from w2r2_ds.models.build import trainable
    from w2r2_ds.objective.scorer import Scorer
    from w2r2_ds.training.step import W2R2Step

    model = whole_model(case.full, json.dumps(asdict(config.model)))
    model.zero_grad()
    tables = token_tables(frontend.tokenizer, model.base.config.get_text_config().vocab_size)
    # Whole and without checkpointing, in every case.
    step = W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()
    if case.pass_order == "single":
        step.two_pass = functools.partial(fused_pass_only, model)
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
    """`whole_gradients` of every case: each rank works out one of two, at the same time, and they are exchanged.

    A case that decodes is worked out by all ranks: they agree token by token on going on.
    """
    import torch.distributed as dist

    ranks = dist.get_world_size()
    for start in range(0, len(cases), ranks):
        own, found = cases[start : start + ranks], None
        for place, case in enumerate(own):
            if place != dist.get_rank() and "shortcut_decode" not in case.objective:
                continue
            config = step_config(case, model_config)
            with scripted(case, scale):
                result = whole_gradients(
                    case, config, cached_front(config.model.vlm, config.model.geometry.path), samples
                )
            found = result if place == dist.get_rank() else found
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, found)
        yield from gathered[: len(own)]


def scripted(case: Case, scale: dict[str, float] | None) -> contextlib.AbstractContextManager[None]:
    """`similar`, where a case does not measure the real scores."""
    return contextlib.nullcontext() if scale is None or case.objective.get("decode_gap_every") else similar(scale)


@functools.cache
def cached_front(vlm: str, geometry: str) -> Any:
    """Tokenizer and vision facts, the same for all cases."""
    from w2r2_ds.config.schema import GeometryConfig, ModelConfig
    from w2r2_ds.models.build import load_frontend

    return load_frontend(ModelConfig(vlm=vlm, geometry=GeometryConfig(path=geometry, layers=[0])))


def count(case: Case) -> int:
    """Samples of an optimizer step."""
    return sum(len(batch) for rank in case.ranks for batch in rank)


def sharded_gradients(
    case: Case, config: Any, frontend: Any, samples: dict[str, Any], ds_config: dict[str, Any]
) -> tuple[dict[str, Any], Any, dict[str, float], Any, list[int]]:
    """The same under ZeRO-3 by the production code: gradients, this rank's statistics, group norms, a decode gap.

    And how often a parameter of a decoder layer was gathered in the last step, every number that there was.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    from w2r2_ds.models.build import build_model, trainable
    from w2r2_ds.training.deepspeed.engine import make_engine
    from w2r2_ds.training.optimizer import trained_groups
    from w2r2_ds.training.reduce import group_norms

    world, device = dist.get_world_size(), torch.device("cpu")
    keep_alive = HfDeepSpeedConfig(ds_config)
    model = build_model(config.model, device, 1)
    awaken(model)  # what trains is whole until the engine takes it
    if case.full:
        unfreeze(model)
    engine = make_engine(model, frontend, config, ds_config, device)
    if case.pass_order == "single":
        engine.module.two_pass = functools.partial(fused_pass_only, model)
    del keep_alive
    batches = batches_of(case, dist.get_rank(), samples, frontend, config)
    scale = len(batches) * world / count(case)
    for step in range(case.steps):
        say(f"step {step} of {case.name}")
        stats = []
        for index, batch in enumerate(batches):
            with count_gathers(model.base.model.language_model) as counts:
                loss, sample_stats = engine(batch)
                engine.backward(loss * scale)
            stats.append(sample_stats)
            if index + 1 == len(batches):
                gradients = {n: safe_get_full_grad(p).clone() for n, p in trainable(model).items()}
                norms = group_norms(trained_groups(model), device)
            engine.step()
    norms["grad_norm"] = float(engine.get_global_grad_norm())
    reading = None
    if case.objective.get("decode_gap_every"):
        from w2r2_ds.training.decode_gap import DecodeGap

        reading = DecodeGap(list(samples.values())[:3], frontend, config, device).measure(engine)
    engine.destroy()
    return gradients, torch.cat(stats), norms, reading, sorted(set(counts.layers.values()))


def compare(
    case: Case,
    model_config: Any,
    samples: dict[str, Any],
    ds_config: dict[str, Any],
    expected: dict[str, Any],
    all_stats: Any,
) -> dict[str, Any]:
    """Values that the test compares: the largest relative difference of a gradient, statistics, norms."""
    import torch
    import torch.distributed as dist

    from w2r2_ds.objective.loss import STATS
    from w2r2_ds.training.deepspeed.config import resolve_ds_config

    config = step_config(case, model_config)
    frontend = cached_front(config.model.vlm, config.model.geometry.path)
    sizes = {"global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch}
    ds_config = ds_config | {"zero_optimization": ds_config["zero_optimization"] | case.zero}
    resolved = resolve_ds_config(
        ds_config, path="zero3_cases.py", world_size=dist.get_world_size(), bf16=False, **sizes
    )
    actual, stats, norms, decode_gap, gathered_so_often = sharded_gradients(case, config, frontend, samples, resolved)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, stats)
    assert actual.keys() == expected.keys()
    worst, silent = 0.0, []
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            silent.append(name)
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
        "silent": silent,
        "stats": dict(zip(STATS, torch.cat(gathered).T.tolist(), strict=True)),
        "stats_worst": float((torch.cat(gathered) - all_stats).abs().max()),
        "norms": norms,
        "expected_norms": {f"grad_norm_{name}": value**0.5 for name, value in squares.items()},
        "decode_gap": decode_gap,
        "gathers": gathered_so_often,
    }


def say(text: str) -> None:
    """A line on rank 0's output, between those of DeepSpeed."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(f"\n== {text}", flush=True)


def work(folder: Path) -> None:
    """Go through the cases; every rank writes what it found."""
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
        signal.alarm(CASE_LIMIT)  # SIGALRM ends the process, and `fork_ranks` the other one
        gradients, stats = next(expected)
        with scripted(case, scale):
            results[case.name] = compare(case, model_config, samples, ds_config, gradients, stats)
        signal.alarm(0)
        gc.collect()
        gc.freeze()  # what is left stays for ever, and every engine collects garbage among all that is not frozen
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
    """Write the input of `work`; `scale` is s of every sample's shortcut answer, None takes the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    assert len({case.name for case in cases}) == len(cases), [asdict(case) for case in cases]
    (folder / "cases.pkl").write_bytes(pickle.dumps((list(cases), model_config, samples, ds_config, scale)))
