"""Data loaders: equal batches with and without workers, and unchanged error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prepared_sets import write_prepared
from w2r2_ds.config.schema import DataConfig, SourceConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import prompt_loader, train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler


def batches(samples: list[Any], frontend: Any, config: Any) -> list[Any]:
    mixture = Mixture([samples], [1.0], [0])
    sampler = GlobalBatchSampler(mixture, global_batch=2, micro_batch=1, rank=0, world_size=1, steps=2)
    return list(train_loader(samples, frontend, config, sampler))


def test_workers_do_not_change_the_batches(samples: list[Any], frontend: Any, data_config: Callable[..., Any]) -> None:
    expected = batches(samples, frontend, data_config(workers=0))
    found = batches(samples, frontend, data_config(workers=1))
    assert [batch.ids for batch in expected] == [batch.ids for batch in found]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_missing_frame_keeps_its_message_with_workers(
    samples: list[Any], frontend: Any, data_config: Callable[..., Any], workers: int
) -> None:
    missing = Path("no/such/00007.jpg")
    bad = replace(samples[0], frames=(*samples[0].frames[:-1], missing))
    with pytest.raises(ValueError, match="00007") as caught:
        batches([bad, samples[1]], frontend, data_config(workers=workers))
    message = str(caught.value)
    assert "Traceback" not in message and message.startswith(f"Frame {missing}") and message == message.strip()
    assert workers == 0 or "images.py" in str(caught.value.__cause__), "the worker's traceback is the cause"
    with pytest.raises(ValueError, match="00007"):
        list(prompt_loader([bad], frontend, data_config(workers=workers), 1))


def test_an_empty_epoch_names_the_files_to_read(samples: list[Any], tmp_path: Path) -> None:
    root = samples[0].frames[0].parents[1]
    folder = write_prepared(tmp_path / "set", samples, root)
    with pytest.raises(ValueError, match=r"set/manifest\.json \(.*skipped\.jsonl"):
        load_mixture(DataConfig(root=str(root), train=(SourceConfig(path=str(folder), weight=1e-9),)), "train")


def test_batches_before_a_bad_sample_are_delivered(
    samples: list[Any], frontend: Any, data_config: Callable[..., Any]
) -> None:
    bad = replace(samples[1], frames=(Path("no/such/00007.jpg"),))
    loader = iter(prompt_loader([samples[0], bad], frontend, data_config(workers=2), 1))
    assert next(loader).ids == (samples[0].id,)
    with pytest.raises(ValueError, match="00007"):
        next(loader)


def test_prefetch_and_pin_memory_options(frontend: Any, data_config: Any, samples: list[Any]) -> None:
    sampler = GlobalBatchSampler(Mixture([samples], [1.0], [0]), 2, 1, rank=0, world_size=1, steps=1)
    loaders = [train_loader(samples, frontend, data_config(workers=w, prefetch=3), sampler) for w in (2, 0)]
    assert [loader.prefetch_factor for loader in loaders] == [3, None]
    assert all(loader.pin_memory == torch.cuda.is_available() for loader in loaders)


def test_copies_to_the_device_are_asynchronous(
    batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all tensors: one synchronous copy makes the host wait for all queued kernels."""
    blocking = []
    real = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, non_blocking: bool = False, **given: Any) -> torch.Tensor:
        blocking.append(not non_blocking)
        return real(self, *args, non_blocking=non_blocking, **given)

    batch = batch_of(samples)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to(torch.device("cpu"))
    assert len(blocking) > 10 and not any(blocking)
