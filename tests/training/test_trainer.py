"""Training through the real launcher, on CPU ranks, in the small world of tests/helpers/runs.py.

The golden losses are recorded again with ``python tests/helpers/runs.py record``; only for a change that is meant to
change training, with the reason in the commit message.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs import GOLDEN_LOSSES, SAVE_EVERY, STEPS, ZERO3, Job, World, read_metrics, run_jobs
from training_jobs import FEW, RESHARDED, STAGES, arguments, on_one_rank, on_two_ranks
from w2r2_ds.objective.push_terms import PUSH_TERMS
from w2r2_ds.training.checkpoint.deepspeed_io import load
from w2r2_ds.training.checkpoint.manifest import MANIFEST, read_manifest, verify

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

EXACT = ("loss", "align", "det", "push", "above_mu", "s_short", "s_fused", "grad_norm", "lr", "merger_lr")
"""Metrics of a line without times and sizes."""
GOLDEN_TOLERANCE = 1e-3
"""Relative. The losses were recorded with AVX2 kernels. A second recording was bit-equal; one with
ATEN_CPU_CAPABILITY=default differed by at most 9.8e-5."""
RANKS_TOLERANCE = 1e-6
"""Relative tolerance of losses; ten times as much for gradient norms. Measured over 6 steps: at most 7.1e-7 with
another micro-batch size (other padding, other order of sums), 2.2e-16 with the same on two ranks."""
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the jobs' runs."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def one_rank(world: World, trained: Path, folder: Path, two_ranks: Reports) -> Reports:
    """All jobs of one rank, in one launch."""
    return run_jobs(1, folder / "one", on_one_rank(world, trained, folder))


@pytest.fixture(scope="module")
def two_ranks(world: World, trained: Path, folder: Path) -> Reports:
    """All jobs of one rank, in one launch."""
    return run_jobs(2, folder / "both", on_two_ranks(world, trained, folder))


def assert_one_sentence(error: str | None, *named: str) -> None:
    """Check that a message is one sentence on one line, and contains `named`."""
    assert error is not None and error.startswith("ValueError: ")
    assert "\n" not in error and error.endswith(".") and not re.search(r"\.\s+[A-Z]", error)
    for name in named:
        assert name in error, f"{name!r} is not in {error!r}"


def assert_same_curve(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal losses and gradient norms within `RANKS_TOLERANCE`."""
    tolerances = {"loss": RANKS_TOLERANCE, "s_short": RANKS_TOLERANCE, "grad_norm": 10 * RANKS_TOLERANCE}
    for one, other in zip(actual, expected, strict=True):
        for name, tolerance in tolerances.items():
            assert one[name] == pytest.approx(other[name], rel=tolerance), f"{name} of step {one['step']}"


def exact(metrics: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{name: line[name] for name in ("step", *EXACT)} for line in metrics]


def test_a_run_ends_with_a_report(trained: Path) -> None:
    assert f"report: {trained / 'report.html'}" in (trained / "output.txt").read_text().splitlines()
    assert (trained / "report.html").stat().st_size > 1e6
    steps = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
    assert {path.name for path in (trained / "samples").iterdir()} == {f"step_{step}.png" for step in steps}


def test_a_run_logs_every_step_and_the_hinge_is_active(trained: Path) -> None:
    metrics = read_metrics(trained)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert sum(line["above_mu"] for line in metrics) > 0
    assert sum(line["push"] for line in metrics) > 0
    assert sum(line["loss"] for line in metrics[-5:]) < sum(line["loss"] for line in metrics[:5])


def test_every_step_logs_the_bias_statistics(trained: Path) -> None:
    for line in read_metrics(trained):
        assert line["s_gain"] == pytest.approx(line["s_fused"] - line["s_short"], abs=1e-6)
        assert line["det"] == pytest.approx(line["s_short"], abs=1e-6)  # mu is 0 here
        assert 0 <= line["invalid_short"] <= 1 and 0 <= line["invalid_fused"] <= 1
        assert line["geometry_norm"] > 0
        both = line["grad_norm_lora"] ** 2 + line["grad_norm_geometry"] ** 2
        assert both == pytest.approx(line["grad_norm"] ** 2, rel=1e-5)


def test_both_learning_rates_are_logged(one_rank: Reports, folder: Path) -> None:
    """After the first of two steps: half of the peak values, the demo's 1e-3 and 3e-4 (cosine schedule)."""
    assert one_rank["rates"][0]["error"] is None
    (line,) = read_metrics(folder / "rates")
    assert (line["lr"], line["merger_lr"]) == (pytest.approx(5e-4), pytest.approx(1.5e-4))


@pytest.mark.golden
def test_losses_equal_the_golden_losses(trained: Path) -> None:
    golden = json.loads(GOLDEN_LOSSES.read_text())
    assert [line["loss"] for line in read_metrics(trained)] == pytest.approx(golden["loss"], rel=GOLDEN_TOLERANCE)


def test_only_the_last_checkpoints_are_kept_with_trained_weights_only(world: World, trained: Path) -> None:
    folder = trained / "checkpoints"
    names = ["latest", *(f"step-{step:06d}" for step in (STEPS - SAVE_EVERY, STEPS))]
    assert sorted(os.listdir(folder)) == ["incarnation.json", *names]
    assert (folder / "latest").read_text().strip() == names[-1]
    tensors = load_file(folder / names[-1] / "trainable.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name or name.startswith("geometry_merger.") for name in tensors)
    # 4 layers x 7 projections x (A, B); the merger.
    assert sum("lora_" in name for name in tensors) == 56
    assert all(tensor.numel() for tensor in tensors.values())
    trained_bytes = sum(tensor.numel() * 4 for tensor in tensors.values())
    everything = sum(file.stat().st_size for file in (folder / names[-1]).rglob("*") if file.is_file())
    # Weights, DeepSpeed's master copy and two moments; then names and padding.
    assert everything < 4 * trained_bytes + 200_000
    listed = read_manifest(folder / names[-1])["files"]
    assert sum(file["bytes"] for file in listed.values()) + (folder / names[-1] / MANIFEST).stat().st_size == everything
    assert everything < (world.folder / "vlm" / "model.safetensors").stat().st_size


def test_engine_shards_have_no_frozen_tensors(trained: Path) -> None:
    (file,) = (trained / "checkpoints" / f"step-{STEPS:06d}" / "engine").glob("*model_states.pt")
    state = load(file)
    kept = [name for name in state["module"] if "lora_" in name or "geometry_merger" in name]
    # DeepSpeed stores the name of the tied head, without its values.
    frozen = {name: tensor.numel() for name, tensor in state["module"].items() if name not in kept}
    assert kept and not any(frozen.values())


def test_two_ranks_give_the_losses_of_one(two_ranks: Reports, trained: Path, folder: Path) -> None:
    assert [report["error"] for report in two_ranks["two"]] == [None, None]
    assert_same_curve(read_metrics(folder / "two"), read_metrics(trained)[:FEW])


def test_losses_do_not_depend_on_gradient_accumulation(two_ranks: Reports, trained: Path, folder: Path) -> None:
    assert [report["error"] for report in two_ranks["two-micro2"]] == [None, None]
    assert_same_curve(read_metrics(folder / "two-micro2"), read_metrics(trained)[:FEW])


def test_token_reduction_does_not_depend_on_the_ranks(
    one_rank: Reports, two_ranks: Reports, trained: Path, folder: Path
) -> None:
    assert one_rank["token"][0]["error"] is None and two_ranks["token"][0]["error"] is None
    one, two = read_metrics(folder / "token1"), read_metrics(folder / "token2")
    assert len(one) == 3
    assert_same_curve(two, one)
    by_sample = [line["loss"] for line in read_metrics(trained)[:3]]
    assert [line["loss"] for line in one] != pytest.approx(by_sample, rel=1e-6)


def test_masks_do_not_depend_on_the_ranks(one_rank: Reports, two_ranks: Reports, trained: Path, folder: Path) -> None:
    assert one_rank["mask"][0]["error"] is None and two_ranks["mask"][0]["error"] is None
    one, two = read_metrics(folder / "mask1"), read_metrics(folder / "mask2")
    assert len(one) == 3
    assert_same_curve(two, one)
    unmasked = [line["loss"] for line in read_metrics(trained)[:3]]
    assert [line["loss"] for line in one] != pytest.approx(unmasked, rel=1e-4)


def test_a_resumed_run_is_bit_equal(one_rank: Reports, trained: Path, folder: Path) -> None:
    """From the checkpoint before the newest one, whose optimizer shard has a flipped bit."""
    assert one_rank["resumed"][0] == {"error": None, "updates": STEPS, "injected": None}
    damaged = folder / "resumed" / "checkpoints" / f"step-{STEPS:06d}"
    printed = (folder / "one" / "output.txt").read_text()
    assert f"{damaged}/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt has SHA-256" in printed
    assert f"Resuming from step-{STEPS - SAVE_EVERY:06d} instead" in printed
    assert damaged.with_name(damaged.name + ".damaged").is_dir() and verify(damaged) is None
    assert exact(read_metrics(folder / "resumed")) == exact(read_metrics(trained))
    last = f"checkpoints/step-{STEPS:06d}/trainable.safetensors"
    ours, theirs = load_file(folder / "resumed" / last), load_file(trained / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_draws_the_same_dropout(one_rank: Reports, trained: Path, folder: Path) -> None:
    assert one_rank["dropout"][0]["error"] is None and one_rank["dropout-resumed"][0]["error"] is None
    whole = read_metrics(folder / "dropout")
    assert len(whole) == 4 and whole[1]["loss"] != read_metrics(trained)[1]["loss"]
    assert exact(read_metrics(folder / "dropout-resumed")) == exact(whole)


def test_two_ranks_resume_with_their_own_random_states(two_ranks: Reports, folder: Path) -> None:
    errors = [report["error"] for name in ("dropout", "dropout-resumed") for report in two_ranks[name]]
    assert errors == [None] * 4
    steps = [folder / "dropout2" / "checkpoints" / f"step-{step:06d}" for step in (2, 4)]
    first, second = (torch.load(steps[0] / f"rng-{rank}.pt")["cpu"] for rank in (0, 1))
    assert not torch.equal(first, second)
    whole = read_metrics(folder / "dropout2")
    assert len(whole) == 4
    assert exact(read_metrics(folder / "dropout2-resumed")) == exact(whole)
    resumed = folder / "dropout2-resumed" / "checkpoints" / "step-000004" / "trainable.safetensors"
    ours, theirs = load_file(resumed), load_file(steps[1] / "trainable.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", STAGES)
def test_other_zero_stages_equal_zero3(one_rank: Reports, trained: Path, folder: Path, name: str) -> None:
    assert one_rank[name][0] == {"error": None, "updates": 3, "injected": None}
    assert_same_curve(read_metrics(folder / name), read_metrics(trained)[:3])
    for line, zero3 in zip(read_metrics(folder / name), read_metrics(trained)[:3], strict=True):
        for group in ("grad_norm_lora", "grad_norm_geometry"):
            assert line[group] == pytest.approx(zero3[group], rel=10 * RANKS_TOLERANCE)
    ours = load_file(folder / name / "checkpoints" / "step-000003" / "trainable.safetensors")
    theirs = load_file(trained / "checkpoints" / f"step-{STEPS:06d}" / "trainable.safetensors")
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert all(tensor.any() for tensor in ours.values()), "whole tensors, and every one of them has been trained"


def test_the_dry_run_does_not_change_the_losses(one_rank: Reports, folder: Path) -> None:
    assert one_rank["no-dry-run"][0] == {"error": None, "updates": 2, "injected": None}
    assert exact(read_metrics(folder / "no-dry-run")) == exact(read_metrics(folder / "dropout"))[:2]


def test_the_decode_gap_does_not_change_the_losses(one_rank: Reports, folder: Path) -> None:
    assert one_rank["decode_gap"][0]["error"] is None
    metrics = read_metrics(folder / "decode_gap")
    assert len(metrics) == 2 and all({"gap_s_teacher", "gap_s_greedy", "gap_abs"} <= set(line) for line in metrics)
    assert exact(metrics) == exact(read_metrics(folder / "dropout"))[:2]


def test_an_inactive_hinge_warns_at_the_end(one_rank: Reports, folder: Path) -> None:
    assert one_rank["silent"][0]["error"] is None
    printed = (folder / "one" / "output.txt").read_text()
    assert "WARNING in 1 steps no sample's shortcut answer was above objective.mu = 0.99" in printed
    assert printed.count("was above objective.mu") == 1  # in the other runs h is positive


def test_a_misspelt_push_term_raises(one_rank: Reports, folder: Path) -> None:
    assert_one_sentence(one_rank["misspelt"][0]["error"], "objective.push_term is 'marign'", "margin", "poe")
    assert not (folder / "misspelt").exists()


def test_a_folder_with_checkpoints_is_not_overwritten(one_rank: Reports, trained: Path, folder: Path) -> None:
    error = one_rank["again"][0]["error"]
    assert_one_sentence(error, "untouched", "checkpoints", "--resume auto", "--out")
    for name in ("metrics.jsonl", "checkpoints/latest"):
        assert (folder / "untouched" / name).read_bytes() == (trained / name).read_bytes()


def test_a_checkpoint_of_another_model_is_rejected(one_rank: Reports, trained: Path, folder: Path) -> None:
    assert_one_sentence(one_rank["other-rank"][0]["error"], "checkpoint.json", "lora_rank", "8", "4")
    for name in ("metrics.jsonl", "checkpoints/latest"):
        assert (folder / "untouched" / name).read_bytes() == (trained / name).read_bytes()
    assert "lora_rank: 8" in (folder / "untouched" / "config.yaml").read_text()


def test_two_ranks_resume_a_run_of_one(two_ranks: Reports, trained: Path, folder: Path) -> None:
    assert [report["error"] for report in two_ranks["two-from-one"]] == [None, None]
    assert_same_curve(read_metrics(folder / "two-from-one"), read_metrics(trained))
    assert not list((folder / "two-from-one" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("name", RESHARDED)
def test_one_rank_resumes_a_run_of_two(one_rank: Reports, two_ranks: Reports, folder: Path, name: str) -> None:
    """In the middle of an epoch, with two learning rates: DeepSpeed's universal load gives all groups the first one."""
    errors = [report["error"] for report in (*two_ranks[name], *one_rank[f"{name}-on-one"])]
    assert errors == [None] * 3
    whole, resumed = read_metrics(folder / name), read_metrics(folder / f"{name}-on-one")
    assert len(whole) == FEW and whole[3]["lr"] != whole[3]["merger_lr"]
    assert resumed[:3] == whole[:3] and resumed[3:] != whole[3:]
    assert_same_curve(resumed, whole)
    for rate in ("lr", "merger_lr"):
        assert [line[rate] for line in resumed] == [line[rate] for line in whole]


def test_a_full_disk_of_one_rank_fails_the_save_but_not_the_run(two_ranks: Reports, folder: Path) -> None:
    assert [report["error"] for report in two_ranks["full"]] == [None, None]
    checkpoints = folder / "full" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["incarnation.json", "latest", "step-000001", "step-000003"]
    assert all(verify(checkpoints / name) is None for name in ("step-000001", "step-000003"))
    assert len(read_metrics(folder / "full")) == 3
    (line,) = [
        line for line in (folder / "both" / "output.txt").read_text().splitlines() if "could not be saved" in line
    ]
    assert "the checkpoint of step 2 could not be saved (rank 1 on " in line and "errno 27" in line
    assert str(checkpoints / "step-000002.") in line and "the newest checkpoint is step-000001" in line


def test_a_launch_without_ownership_stops_and_writes_nothing(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["taken-over"]
    assert first == second
    assert first["error"].startswith("OwnershipLost: ") and "was taken over by launch 2" in first["error"]
    checkpoints = folder / "taken-over" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["incarnation.json", "latest", "step-000001"]
    assert verify(checkpoints / "step-000001") is None


def test_a_checkpoint_with_code_raises_without_running_it(one_rank: Reports, folder: Path) -> None:
    error = one_rank["malicious"][0]["error"]
    assert_one_sentence(error, "malicious", "optim_states.pt", "posix.mkdir")
    assert not (folder / "malicious" / "it-ran").exists()


def test_a_contradicting_deepspeed_json_raises(one_rank: Reports, folder: Path) -> None:
    error = one_rank["contradiction"][0]["error"]
    assert_one_sentence(error, "contradiction.json", "train_micro_batch_size_per_gpu is 2", "train.micro_batch is 4")
    assert not (folder / "none").exists()


def test_a_truncated_frame_stops_all_ranks_before_the_model_is_loaded(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["cut-frame"]
    assert first == second
    assert_one_sentence(first["error"], str(folder / "scenes" / "posed_images"), ".jpg", "replace the file")
    assert first["updates"] == 0 and not (folder / "cut").exists()


def test_a_sample_that_is_too_long_stops_all_ranks_before_the_model_is_loaded(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["long"]
    assert first == second
    assert_one_sentence(first["error"], "Sample scene", "tokens, more than data.max_length = 100", "raise it")
    assert first["updates"] == 0 and not (folder / "long").exists()


def test_an_unwritable_log_stops_all_ranks_before_the_first_step(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["other-log"]
    assert first == second
    assert_one_sentence(first["error"], str(folder / "other-log" / "metrics.jsonl"), "line 1", "move the file away")
    assert first["updates"] == 0


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["nan"]
    assert first["injected"] is None and second["injected"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("FloatingPointError: The loss is not finite")
    assert first["error"].endswith(f"Samples: {second['injected']}.")
    assert first["updates"] == second["updates"] == 1
    assert len(read_metrics(folder / "nan")) == 1
    assert (folder / "nan" / "checkpoints" / "latest").read_text() == "step-000001\n"


def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_update(two_ranks: Reports, folder: Path) -> None:
    first, second = two_ranks["nan-gradient"]
    assert first["injected"] is None and second["injected"]
    for report in (first, second):
        assert report["error"].startswith("FloatingPointError: The gradient norm is not finite")
        assert report["updates"] == 1
    assert second["injected"] in second["error"]
    assert len(read_metrics(folder / "nan-gradient")) == 1
    assert (folder / "nan-gradient" / "checkpoints" / "latest").read_text() == "step-000001\n"


@pytest.mark.parametrize("key", ["objective.lamda", "train.batch"])
def test_an_unknown_option_is_rejected(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    from w2r2_ds.commands.train import read_arguments

    with pytest.raises(SystemExit):
        read_arguments([*arguments(world, tmp_path), f"--{key}", "1"])
    assert key in capsys.readouterr().err


def test_an_unknown_key_of_a_recipe_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from w2r2_ds.commands.train import read_arguments

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective:\n  lamda: 1.0\n")
    with pytest.raises(SystemExit):
        read_arguments(["--deepspeed", str(ZERO3), "--config", str(recipe)])
    assert "lamda" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_fifty_steps_of_every_push_term(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses stay finite and metrics are written; push terms with a gradient end with other weights than `none`."""
    monkeypatch.setattr("runs.TIMEOUT", 7000)
    decode_gap: dict[str, object] = {"objective__decode_gap_every": 25, "objective__decode_gap_samples": 4}
    changes: dict[str, object] = {"train__steps": 50, "train__save_every": 50, **decode_gap}
    names = list(PUSH_TERMS)
    jobs = [Job(name, arguments(world, tmp_path / name, objective__push_term=name, **changes)) for name in names]
    reports = run_jobs(1, tmp_path / "jobs", jobs)
    assert [reports[name][0]["error"] for name in names] == [None] * len(names)
    last = {}
    for name in names:
        metrics = read_metrics(tmp_path / name)
        assert [line["step"] for line in metrics] == list(range(1, 51))
        assert all(math.isfinite(value) for line in metrics for value in line.values())
        assert {"gap_s_teacher", "gap_s_greedy", "gap_abs"} <= set(metrics[24]) and "gap_abs" not in metrics[23]
        last[name] = load_file(tmp_path / name / "checkpoints" / "step-000050" / "trainable.safetensors")
    for name in names:
        same = all(torch.equal(tensor, last["none"][key]) for key, tensor in last[name].items())
        # The expected boxes of the tiny model never overlap a label by mu, so `unblocked` may have no gradient.
        assert same == (name in ("none", "literal")) or name == "unblocked", name
