"""Ranks from the launchers' environment variables; errors of one rank on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from runs import run_ranks
from w2r2_ds.utils.distributed import RankInfo, local_world_size, raise_on_all_ranks

FAILURES: dict[str, tuple[Exception | None, Exception | None]] = {
    "none": (None, None),
    "first": (ValueError("The first is wrong."), None),
    "second": (None, ValueError("The second is wrong.")),
    "both": (ValueError("The first is wrong."), ValueError("The second is wrong.")),
    "disk": (None, OSError("disk full")),
}
"""Exceptions of ranks 0 and 1."""


def work(folder: Path) -> None:
    """Run all cases on one rank. A missing collective in one case would fail the next one."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    raised: dict[str, str | None] = {}
    for name, failures in FAILURES.items():
        raised[name] = None
        try:
            with raise_on_all_ranks():
                if failures[rank] is not None:
                    raise failures[rank]
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(raised))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks(2, Path(__file__), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.pop("disk") == "ValueError: OSError('disk full')"
    assert second.pop("disk") == "OSError: disk full"
    assert first == second
    assert first == {
        "none": None,
        "first": "ValueError: The first is wrong.",
        "second": "ValueError: The second is wrong.",
        "both": "ValueError: The first is wrong.",
    }


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_without_a_process_group_errors_pass_unchanged(kind: type[Exception]) -> None:
    with raise_on_all_ranks():
        pass
    failure = kind("wrong")
    with pytest.raises(kind) as caught, raise_on_all_ranks():
        raise failure
    assert caught.value is failure


def test_rank_info_of_launchers() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert RankInfo.from_environment({}) == RankInfo(0, 1, 0, 1)
    assert RankInfo.from_environment(torchrun) == RankInfo(5, 8, 1, 4)
    assert RankInfo.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == RankInfo(1, 2, 1, 2)
    assert RankInfo.from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == RankInfo(), "a batch shell"
    for name in ("RANK", "LOCAL_RANK"):
        with pytest.raises(ValueError, match=f"\\b{name} is not set"):
            RankInfo.from_environment({key: value for key, value in torchrun.items() if key != name})


def test_ranks_of_this_machine() -> None:
    assert local_world_size(6, {}) == 6
    assert local_world_size(6, {"LOCAL_SIZE": "3"}) == 3
    assert local_world_size(6, {"LOCAL_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}) == 2
