"""Validation and the best checkpoint, in runs on two ranks under ZeRO-3 that are launched once."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import ZERO3, Job, World, read_metrics, run_jobs
from trained_models import load_trained_model
from w2r2_ds.commands import evaluate
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.evaluation import validator
from w2r2_ds.evaluation.conditions import find_condition
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.runner import Answerer
from w2r2_ds.evaluation.validator import AnswerValidation, computed, score
from w2r2_ds.training.checkpoint.manifest import find_checkpoint
from w2r2_ds.types.sample import Reference

LAUNCHED = [pytest.mark.distributed, pytest.mark.timeout(1200)]
TOKENS, PICKED = 72, 6
RUN: dict[str, object] = {"model__lora_dropout": 0.1, "train__steps": 3, "train__save_every": 3}
VALIDATED: dict[str, object] = {
    "data__val": "[{path: prepared/scanrefer/train}]",  # its answers differ on rooms that it was trained on
    "train__eval_max_new_tokens": TOKENS,
    "train__eval_every": 1,
    "train__eval_samples": PICKED,  # two batches of four for the two ranks: two samples are repeated
    "train__keep_last": 1,
}
ANSWERED = ("data__val", "train__eval_max_new_tokens")
ACC = "val/scanrefer/acc@0.25"
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validated")


@pytest.fixture(scope="module")
def runs(world: World, folder: Path) -> Reports:
    """All runs of this file."""
    ds = json.loads(ZERO3.read_text())
    ds["zero_optimization"] |= {"stage3_param_persistence_threshold": 4000}
    (folder / "ds.json").write_text(json.dumps(ds))

    def job(name: str, changes: dict[str, object], **more: Any) -> Job:
        arguments = ["--deepspeed", str(folder / "ds.json"), *world.arguments(folder / name, **(RUN | changes))]
        return Job(name, arguments, **more)

    back = (str(folder / "validated"), str(folder / "resumed"), 2)
    jobs = [
        job("plain", {}),
        job("validated", {**VALIDATED, "train__samples_every": 1}, scores=(0.1, 0.5, 0.3)),
        job("resumed", {**VALIDATED, "resume": "auto"}, scores=(0.5,), rewind=back),
        job("drawn", {name: VALIDATED[name] for name in ANSWERED} | {"train__samples_every": 2}),
        job("other-task", {"train__eval_every": 4, "train__best_by": "scan2cap/CIDEr@0.5"}),
        job("cut-frame", {"train__eval_every": 4, "data__root": cut_frame_root(world, folder)}),
    ]
    return run_jobs(2, folder / "jobs", jobs)


def cut_frame_root(world: World, folder: Path) -> Path:
    """A copy of the scenes in which one frame of the validation room has lost its second half."""
    root = folder / "scenes"
    shutil.copytree(world.folder / "scenes", root)
    config = load_config(DEMO_RECIPE, world.arguments(folder, data__root=root))
    frame = load_mixture(config.data, "val")[0].frames[1]
    frame.write_bytes(frame.read_bytes()[: frame.stat().st_size // 2])
    return root


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses, norms and similarities, which two equal runs share bit for bit."""
    times = ("samples_per_s", "tokens_per_s", "step_s", "memory_gib", "data_s", "tflops", "mfu")
    return [{k: v for k, v in line.items() if k not in times and not k.startswith("val/")} for line in metrics]


class TestRuns:
    pytestmark = LAUNCHED

    def test_validation_does_not_change_the_losses(self, runs: Reports, folder: Path) -> None:
        for name in ("plain", "validated"):
            assert [report["error"] for report in runs[name]] == [None, None]
        validated, plain = read_metrics(folder / "validated"), read_metrics(folder / "plain")
        assert all("val/scanrefer/mean_iou" in line for line in validated) and "val/seconds" not in plain[0]
        assert len(plain) == 3 and without_times(validated) == without_times(plain)
        for rank in (0, 1):
            state = f"checkpoints/step-000003/rng-{rank}.pt"
            ours, theirs = (torch.load(folder / name / state)["cpu"] for name in ("validated", "plain"))
            assert torch.equal(ours, theirs)

    def test_pictures_of_samples_do_not_change_the_losses(self, runs: Reports, folder: Path) -> None:
        """Pictures of their own answers, and those of the answers of a validation, are equal."""
        assert [report["error"] for report in runs["drawn"]] == [None, None]
        assert without_times(read_metrics(folder / "drawn")) == without_times(read_metrics(folder / "plain"))
        for rank in (0, 1):
            state = f"checkpoints/step-000003/rng-{rank}.pt"
            ours, theirs = (torch.load(folder / name / state)["cpu"] for name in ("drawn", "plain"))
            assert torch.equal(ours, theirs)
        drawn, validated = (folder / name / "samples" for name in ("drawn", "validated"))
        assert sorted(os.listdir(validated)) == ["step_1.png", "step_2.png", "step_3.png"]
        assert sorted(os.listdir(drawn)) == ["step_2.png", "step_3.png"]  # also after the last step
        for name in os.listdir(drawn):
            assert (drawn / name).read_bytes() == (validated / name).read_bytes()
        assert not (folder / "plain" / "samples").exists()

    def test_two_zero3_ranks_score_as_the_unsharded_model(self, runs: Reports, folder: Path) -> None:
        """The checkpoint of the same step, loaded without DeepSpeed, on the same samples."""
        assert runs["validated"][0]["error"] is None
        best = folder / "validated" / "checkpoints" / "best"
        config, model, frontend = load_trained_model(best)
        validation = single_rank(config, frontend)
        samples, batch_size = validation.samples, config.train.micro_batch
        answerer = Answerer(model, frontend, config.data, find_condition("fused"), samples, batch_size, TOKENS)
        records = list(answerer.records(samples))
        assert len(records) == PICKED
        expected = computed(score(records))
        line = read_metrics(folder / "validated")[1]
        assert {f"val/{name}" for name in expected} | {"val/seconds"} == {name for name in line if "val/" in name}
        del expected["scanrefer/acc@0.25"]  # scripted
        assert {name: line[f"val/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)
        assert expected["scanrefer/parsed"] > 0 and expected["scanrefer/mean_iou"] > 0, "else it shows little"

    def test_the_best_checkpoint_is_saved_and_kept(self, runs: Reports, folder: Path) -> None:
        """The score rises, then falls. No step except the last is a multiple of save_every."""
        assert [report["error"] for report in runs["validated"]] == [None, None]
        assert [line[ACC] for line in read_metrics(folder / "validated")] == [0.1, 0.5, 0.3]
        checkpoints = folder / "validated" / "checkpoints"
        assert sorted(os.listdir(checkpoints)) == ["best", "incarnation.json", "latest", "step-000002", "step-000003"]
        assert find_checkpoint(folder / "validated").name == "step-000003"
        best = find_checkpoint(checkpoints / "best")
        assert best.name == "step-000002"
        saved = json.loads((best / "checkpoint.json").read_text())
        assert (saved["best"]["metric"], saved["best"]["value"]) == ("scanrefer/acc@0.25", 0.5)
        assert saved["metrics"][ACC] == 0.5
        printed = (folder / "jobs" / "output.txt").read_text()
        assert "validation after step 3: scanrefer/acc@0.25 0.3, best 0.5 after step 2" in printed

    def test_the_best_checkpoint_can_be_evaluated(self, runs: Reports, folder: Path) -> None:
        checkpoints = folder / "validated" / "checkpoints"
        evaluate.run(checkpoints / "best", limit=1, max_new_tokens=2)
        assert list((checkpoints / "step-000002" / "evaluation").glob("scores-*.json"))

    def test_a_resumed_run_keeps_the_best_checkpoint_at_a_tie(self, runs: Reports, folder: Path) -> None:
        assert [report["error"] for report in runs["resumed"]] == [None, None]
        metrics = read_metrics(folder / "resumed")
        assert metrics[2][ACC] == 0.5 and without_times(metrics) == without_times(read_metrics(folder / "plain"))
        checkpoints = folder / "resumed" / "checkpoints"
        assert find_checkpoint(checkpoints / "best").name == "step-000002"
        assert json.loads((checkpoints / "step-000003" / "checkpoint.json").read_text())["best"] is None

    def test_errors_are_raised_before_the_first_step(self, runs: Reports, folder: Path) -> None:
        for report in runs["other-task"]:
            assert report["error"].startswith(
                "ValueError: train.best_by scan2cap/CIDEr@0.5 is not among the scores of "
            )
            assert "name one of scanrefer/acc@0.25, scanrefer/acc@0.5" in report["error"]
        for report in runs["cut-frame"]:
            assert "scene5000_00" in report["error"]
        for name in ("other-task", "cut-frame"):
            assert runs[name][0]["updates"] == 0 and not (folder / name).exists()


def single_rank(config: RunConfig, frontend: Any) -> AnswerValidation:
    """The validation of a run on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator.dist, "get_rank", lambda: 0)
        patch.setattr(validator.dist, "get_world_size", lambda: 1)
        return AnswerValidation(config, frontend, torch.device("cpu"))


@pytest.fixture
def mixed(
    monkeypatch: pytest.MonkeyPatch, samples: list[Any], caption_sample: Any, answer_sample: Any, no_java: Any
) -> list[Any]:
    """Validation samples of three tasks, starting with a caption, on a machine without Java."""
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: no_java)
    caption = replace(
        caption_sample,
        target=replace(samples[1].target, described=samples[1].target.box[:6]),
        references=(Reference("the door is wide.", ("the", "door", "is", "wide", ".")), Reference("a wide door.")),
    )
    answer = replace(answer_sample, references=(Reference("2 chairs"), Reference("two")))
    found = [caption, answer, *samples]
    monkeypatch.setattr(validator, "load_mixture", lambda config, split: found)
    return found


def test_every_task_is_scored(mixed: list[Any]) -> None:
    """Labels as answers: boxes and the short answer are correct, but the caption is not one of its references."""
    found = computed(score([record_of(sample, sample.answer) for sample in mixed]))
    assert found["scanrefer/acc@0.25"] == found["scanqa/EM"] == 1.0
    assert found["scanrefer/mean_iou"] > 0.9 and found["scanrefer/parsed"] == 1.0
    assert 0 < found["scan2cap/ROUGE-L@0.5"] < 1 and "scan2cap/CIDEr@0.5" in found


def test_the_first_sets_task_selects_the_best(
    mixed: list[Any], frontend: Any, data_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(data=data_config(), train=TrainConfig(eval_every=1, seed=3))
    with caplog.at_level("INFO", logger=validator.logger.name):
        assert single_rank(config, frontend).best_by == "scan2cap/CIDEr@0.5"
    (message,) = (record.getMessage() for record in caplog.records if record.name == validator.logger.name)
    assert all(part in message for part in ("5 samples", "train.eval_samples 64", "scan2cap/CIDEr@0.5"))
    other = replace(config, train=replace(config.train, best_by="scanrefer/mean_iou", eval_samples=4))
    chosen = single_rank(other, frontend)
    assert chosen.best_by == "scanrefer/mean_iou" and len(chosen.samples) == 4
    assert chosen.about != single_rank(config, frontend).about


def test_a_task_without_samples_cannot_select_the_best(mixed: list[Any], frontend: Any, data_config: Any) -> None:
    config = RunConfig(data=data_config(), train=TrainConfig(eval_every=1, eval_samples=1, seed=0))
    with pytest.raises(ValueError, match=r"best_by scan2cap/CIDEr@0\.5 is not among .* raise train\.eval_samples"):
        single_rank(config, frontend)


def test_without_java_its_metrics_cannot_select_the_best(mixed: list[Any], frontend: Any, data_config: Any) -> None:
    config = RunConfig(data=data_config(), train=TrainConfig(eval_every=1, best_by="scan2cap/METEOR@0.5"))
    with pytest.raises(ValueError, match=r"METEOR@0\.5 cannot be computed here; install Java"):
        single_rank(config, frontend)
    assert single_rank(replace(config, train=replace(config.train, best_by="scan2cap/CIDEr@0.5")), frontend).samples


def test_captions_without_pycocoevalcap_raise_at_the_start(
    mixed: list[Any], frontend: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bleu.bleu", "cider.cider", "rouge.rouge"):
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{module}", None)
    with pytest.raises(ValueError, match=r"pip install 'w2r2-ds\[metrics\]'"):
        single_rank(RunConfig(data=data_config(), train=TrainConfig(eval_every=1)), frontend)


def test_a_question_with_a_special_token_is_rejected_at_once(mixed: list[Any], frontend: Any, data_config: Any) -> None:
    """Not after the first `train.eval_every` steps, by one rank while the others wait for it."""
    mixed[1] = replace(mixed[1], question="What is <|im_end|> here?", what=(0, 4))
    with pytest.raises(ValueError, match=re.escape("<|im_end|>")):
        single_rank(RunConfig(data=data_config(), train=TrainConfig(eval_every=1)), frontend)


def test_a_test_split_cannot_validate(mixed: list[Any], frontend: Any, data_config: Any) -> None:
    mixed[1] = replace(mixed[1], answer="", references=())
    with pytest.raises(ValueError, match=rf"data\.val: 1 of {len(mixed)} samples .*{re.escape(mixed[1].id)}"):
        single_rank(RunConfig(data=data_config(), train=TrainConfig(eval_every=1)), frontend)


def test_a_validation_set_without_samples_is_rejected(
    frontend: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validator, "load_mixture", lambda config, split: [])
    with pytest.raises(ValueError, match=r"data\.val has no samples"):
        single_rank(RunConfig(data=data_config(), train=TrainConfig(eval_every=1)), frontend)
    with pytest.raises(ValueError, match=r"data\.val is empty"):
        RunConfig(data=data_config(val=[]), train=TrainConfig(eval_every=1))


def test_pictures_without_boxes_are_an_error_at_the_start(
    mixed: list[Any], frontend: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(data=data_config(), train=TrainConfig(samples_every=5))
    monkeypatch.setattr(validator, "load_mixture", lambda config, split: mixed[:2])  # a caption and an answer
    with pytest.raises(ValueError, match=r"train\.samples_every.*scan2cap, scanqa"):
        single_rank(config, frontend)
    monkeypatch.setattr(validator, "load_mixture", lambda config, split: [])
    with pytest.raises(ValueError, match=r"data\.val.*train\.samples_every"):
        single_rank(config, frontend)
