"""Means of the decode gap, on simulated ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from objectives import objective_config
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.training import decode_gap
from w2r2_ds.training.decode_gap import DecodeGap

S = {"four": (0.9, 0.5), "three": (0.2, 0.4), "twelve": (0.6, 0.0)}
"""Teacher-forced and decoded s by sample."""


class Engine:
    """Stub of the engine that records its inputs and modes."""

    def __init__(self) -> None:
        self.training, self.seen = True, []

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def __call__(self, batch: Any, mode: str) -> torch.Tensor:
        assert mode == "decode_gap" and not self.training and batch.prompts is not None
        self.seen.append(batch.ids)
        return torch.tensor([S[identity] for identity in batch.ids])


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("wanted", [2, 3, 50])
def test_means_do_not_depend_on_the_number_of_ranks(
    samples: list[Any],
    frontend: Any,
    data_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    micro: int,
    wanted: int,
) -> None:
    """Every rank runs equally many forwards; samples that fill the last batches are counted once."""
    config = RunConfig(
        data=data_config(),
        objective=objective_config(decode_gap_samples=wanted),
        train=TrainConfig(micro_batch=micro, seed=3),
    )
    monkeypatch.setattr(decode_gap.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(decode_gap.dist, "all_reduce", lambda tensor: None)  # the sums of the ranks are added below
    engines, shares = [Engine() for _ in range(world)], []
    for rank in range(world):
        monkeypatch.setattr(decode_gap.dist, "get_rank", lambda rank=rank: rank)
        shares.append(DecodeGap(samples, frontend, config, torch.device("cpu")).measure(engines[rank]))
        assert engines[rank].training
    assert len({len(engine.seen) for engine in engines}) == 1
    order = torch.randperm(3, generator=torch.Generator().manual_seed(3)).tolist()[:wanted]
    chosen = [S[samples[index].id] for index in order]
    expected = {
        "gap_s_teacher": sum(teacher for teacher, _ in chosen) / len(chosen),
        "gap_s_greedy": sum(greedy for _, greedy in chosen) / len(chosen),
        "gap_abs": sum(abs(teacher - greedy) for teacher, greedy in chosen) / len(chosen),
    }
    assert {name: sum(share[name] for share in shares) for name in expected} == pytest.approx(expected)
