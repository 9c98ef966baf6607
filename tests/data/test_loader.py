"""Data loaders: equal batches with and without workers, and unchanged error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils.data import Dataset

from prepared_sets import write_prepared
from w2r2_ds.config.schema import DataConfig, SourceConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import ReraisingDataLoader, prompt_loader, train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.tasks.parsing import AnswerError


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
    assert workers == 0 or "in load_frame" in str(caught.value.__cause__), "the worker's traceback is the cause"
    with pytest.raises(ValueError, match="00007"):
        list(prompt_loader([bad], frontend, data_config(workers=workers), 1))


class Failing(Dataset[int]):
    """A data set with one item: the result of a function that may raise."""

    def __init__(self, error: Callable[[], Any]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.error()


def not_utf8() -> None:
    b"caf\xc3".decode()


def not_json() -> None:
    json.loads("{")


def not_an_integer() -> None:
    TypeAdapter(int).validate_python("x")


def of_two_lines() -> None:
    raise ValueError("frame.jpg is broken:\nValueError: bad header\n")


def answer() -> None:
    raise AnswerError("it is not an integer")


def empty() -> None:
    raise ValueError


def returned() -> None:
    return None


def raise_item(items: list[Any]) -> Any:
    raise ValueError(f"{len(items)} item cannot be collated")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [not_utf8, not_json, not_an_integer, of_two_lines, answer, empty, returned])
def test_errors_of_items_and_of_collating_keep_their_message(error: Callable[[], None], workers: int) -> None:
    with pytest.raises(ValueError) as expected:
        raise_item([error()])
    with pytest.raises(ValueError) as caught:
        next(iter(ReraisingDataLoader(Failing(error), raise_item, num_workers=workers)))
    assert str(caught.value) == str(expected.value)
    assert workers == 0 or "in __getitems__" in str(caught.value.__cause__)


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
    sampler: Any = [[0], [1]]
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
