"""Evaluation of a trained run: answers against stock transformers' generation, and at other batch sizes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_inputs import pixel_values
from metric_cases import undocumented
from runs import STEPS, World
from trained_models import load_trained_model
from w2r2_ds.commands.evaluate import main as evaluate_main
from w2r2_ds.commands.evaluate import run as evaluate_command
from w2r2_ds.config.schema import SourceConfig
from w2r2_ds.convert.peft_adapter import export_adapter
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.loader import prompt_loader
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.evaluation.conditions import find_condition
from w2r2_ds.evaluation.datasets import all_samples, find_sets
from w2r2_ds.evaluation.options import EvaluationOptions
from w2r2_ds.evaluation.runner import Answerer, evaluate
from w2r2_ds.evaluation.scoring import NOT_SCORED
from w2r2_ds.training.checkpoint.manifest import find_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TOKENS = 40
"""Enough tokens for the frame and the first number; the tiny model's answers differ by then."""


@pytest.fixture(scope="module")
def loaded(trained: Path) -> Any:
    """Configuration, model and VLM frontend of the run's last checkpoint."""
    return load_trained_model(trained)


@pytest.fixture(scope="module")
def prompts(loaded: Any) -> list[Any]:
    """Prompts of different lengths from both splits."""
    config = loaded[0]
    chosen = [*load_mixture(config.data, "val")[:4], *load_mixture(config.data, "train")[:2]]
    assert len({len(sample.question) for sample in chosen}) > 1
    return chosen


def answers(loaded: Any, samples: Sequence[Any], geometry: str, batch_size: int) -> list[tuple[str, list[int], str]]:
    config, model, frontend = loaded
    records = Answerer(model, frontend, config.data, find_condition(geometry), samples, batch_size, TOKENS).records(
        samples
    )
    return [(record["id"], record["tokens"], record["text"]) for record in records]


def test_answers_without_geometry_equal_stock_generation(loaded: Any, prompts: list[Any]) -> None:
    config, model, frontend = loaded
    ours = [tokens for _, tokens, _ in answers(loaded, prompts, "zero", 4)]
    end = frontend.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stock = []
    for batch in prompt_loader(prompts, frontend, config.data, 4):
        output = model.vlm.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.token_types,
            pixel_values=pixel_values(batch.visuals),
            image_grid_thw=batch.visuals.grid_thw,
            do_sample=False,
            max_new_tokens=TOKENS,
        )
        for row in output[:, batch.input_ids.shape[1] :].tolist():
            stock.append(row[: row.index(end)] if end in row else row)
    assert ours == stock
    assert all(ours) and len({tuple(tokens) for tokens in ours}) > 1


@pytest.mark.parametrize("geometry", ["fused", "zero"])
def test_left_padding_does_not_change_answers(loaded: Any, prompts: list[Any], geometry: str) -> None:
    lengths = {int(batch.attention_mask.sum()) for batch in prompt_loader(prompts, loaded[2], loaded[0].data, 1)}
    assert len(lengths) > 1, "some prompts are padded"
    assert answers(loaded, prompts, geometry, len(prompts)) == answers(loaded, prompts, geometry, 1)


@torch.no_grad()
def test_answers_depend_on_geometry(loaded: Any, prompts: list[Any]) -> None:
    _, model, frontend = loaded
    (batch,) = prompt_loader(prompts, frontend, loaded[0].data, len(prompts))
    features = model.encode_3d(batch.visuals)
    assert model.merge(features).abs().max() > 1e-4, "the merger has left its zeros"
    assert model.zero_geometry_tokens(features) is None


def test_decoding_is_greedy_with_any_generation_config(loaded: Any, prompts: list[Any]) -> None:
    plain = answers(loaded, prompts, "fused", 4)
    generation = loaded[1].base.generation_config
    before = generation.repetition_penalty
    generation.repetition_penalty = 1.5
    try:
        assert answers(loaded, prompts, "fused", 4) == plain
    finally:
        generation.repetition_penalty = before


def test_an_unknown_geometry_is_rejected(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--geometry is 'none'; it is one of fused, zero"):
        evaluate(trained, tmp_path / "out", EvaluationOptions("none"))


def test_predictions_have_one_line_per_validation_sample(loaded: Any, trained: Path, tmp_path: Path) -> None:
    scores = evaluate(trained, tmp_path / "out", EvaluationOptions("fused", batch_size=8, max_new_tokens=TOKENS))
    samples = load_mixture(loaded[0].data, "val")
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "predictions-scanrefer-fused.jsonl").read_text().splitlines()
    ]
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert all(line["text"] and line["tokens"] for line in lines)
    assert json.loads((tmp_path / "out" / "scores-scanrefer-fused.json").read_text()) == scores
    result = scores["protocols"]["scanrefer/vgllm-direct"]
    assert result["overall"]["count"] == result["count"] == scores["samples"] == scores["of"] == len(samples)
    assert (scores["geometry"], scores["checkpoint"]) == ("fused", str(trained))
    (data,) = scores["data"]
    assert data["manifest"] == hashlib.sha256((Path(data["path"]) / "manifest.json").read_bytes()).hexdigest()
    assert [file.name for file in (tmp_path / "out").glob("parts-*")] == []
    assert undocumented(scores, "index") == set()


def test_a_limit_takes_the_first_samples(loaded: Any, trained: Path, tmp_path: Path) -> None:
    scores = evaluate(trained, tmp_path, EvaluationOptions("zero", max_new_tokens=4, limit=2))
    config, model, frontend = loaded
    samples = load_mixture(config.data, "val")
    lines = [json.loads(line) for line in (tmp_path / "predictions-scanrefer-zero.jsonl").read_text().splitlines()]
    assert (scores["samples"], scores["of"]) == (2, len(samples))
    answerer = Answerer(model, frontend, config.data, find_condition("zero"), samples, 2, 4)
    assert lines == list(answerer.records(samples[:2]))


def test_shuffled_geometry_comes_from_another_room(loaded: Any, trained: Path, tmp_path: Path) -> None:
    """The training set has two rooms, the validation set one."""
    _, model, frontend = loaded
    with pytest.raises(ValueError, match="at least two rooms with frames, but there are 1"):
        evaluate(trained, tmp_path, EvaluationOptions("shuffle", max_new_tokens=4))
    options = EvaluationOptions(
        "shuffle",
        data=Path("prepared/scanrefer/train"),
        limit=2,
        batch_size=2,
        max_new_tokens=4,
        protocols=["vgllm-direct", "video3dllm"],
    )
    scores = evaluate(trained, tmp_path, options)
    assert list(scores["protocols"]) == ["scanrefer/vgllm-direct", "scanrefer/video3dllm"]
    whole = load_mixture(loaded[0].data, "train")
    assert (scores["samples"], scores["of"]) == (2, len(whole))
    lines = [json.loads(line) for line in (tmp_path / "predictions-scanrefer-shuffle.jsonl").read_text().splitlines()]
    answerer = Answerer(model, frontend, loaded[0].data, find_condition("shuffle"), whole, 2, 4)
    assert lines == list(answerer.records(whole[:2]))


def test_finished_answers_are_reused_and_other_options_raise(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If scoring fails, all answers are saved, and the next run generates none."""
    monkeypatch.setattr("w2r2_ds.evaluation.runner.score_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(trained, tmp_path, EvaluationOptions(max_new_tokens=4, limit=2))
    monkeypatch.undo()
    for options, field in (({"max_new_tokens": 5}, "max_new_tokens is 4, but now it is 5"),):
        with pytest.raises(ValueError, match=field):
            evaluate(trained, tmp_path, EvaluationOptions(limit=2, **options))
    monkeypatch.setattr(
        "w2r2_ds.evaluation.generate.generate_tokens", lambda *_: pytest.fail("an answer was generated again")
    )
    assert evaluate(trained, tmp_path, EvaluationOptions(max_new_tokens=4, limit=2))["samples"] == 2
    # A finished evaluation is kept with --reuse, and scored again by other protocols.
    words = ["--checkpoint", trained, "--out", tmp_path, "--max_new_tokens", 4, "--limit", 2, "--reuse", "true"]
    file = tmp_path / "scores-scanrefer-fused.json"
    before = file.read_text(), file.stat().st_mtime_ns
    assert evaluate_main([str(word) for word in words]) == 0
    assert (file.read_text(), file.stat().st_mtime_ns) == before
    assert evaluate_main([str(word) for word in [*words, "--protocol", "video3dllm"]]) == 0
    scores, old = json.loads(file.read_text()), json.loads(before[0])
    assert set(scores["protocols"]) == {*old["protocols"], "scanrefer/video3dllm"}
    assert scores["run"] == old["run"] and scores["protocols"].items() >= old["protocols"].items()
    with pytest.raises(pytest.fail.Exception, match="generated again"):  # other options: not the same evaluation
        evaluate_command(trained, out=tmp_path, max_new_tokens=3, limit=2, reuse=True)


def test_a_data_set_is_selected_by_task_or_folder(loaded: Any, trained: Path, tmp_path: Path) -> None:
    config = loaded[0].data
    (default,) = find_sets(config)
    (named,) = find_sets(config, "scanrefer", Path("prepared/scanrefer/val"))
    (placed,) = find_sets(config, None, Path(config.root) / "prepared/scanrefer/val")
    assert default.folder == named.folder == placed.folder and default.task == "scanrefer"
    with pytest.raises(ValueError, match=r"data\.val .*prepared/scanrefer/val \(scanrefer\).* scanqa; .*--data"):
        evaluate(trained, tmp_path, EvaluationOptions(task="scanqa"))
    with pytest.raises(ValueError, match=r"scanrefer, not scanqa; .*--data or --task"):
        find_sets(config, "scanqa", placed.folder)
    with pytest.raises(ValueError, match="nowhere is not a prepared data set"):
        find_sets(config, None, tmp_path / "nowhere")
    shutil.copytree(default.folder, tmp_path / "copy")
    twice = replace(config, val=[*config.val, SourceConfig(str(tmp_path / "copy"))])
    with pytest.raises(ValueError, match=r"ids appear twice in .*, the first is"):
        all_samples(find_sets(twice))


def test_a_wrong_protocol_raises_before_the_model_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2r2_ds.evaluation.runner.trained_model", lambda *_: pytest.fail("the model was loaded"))
    for protocol, message in (("scanqa/leo", "scores scanqa"), ("vgllm_refined", "needs detected boxes")):
        with pytest.raises(ValueError, match=message):
            evaluate(trained, tmp_path, EvaluationOptions(protocols=[protocol]))


def test_a_test_split_is_answered_and_not_scored(loaded: Any, trained: Path, tmp_path: Path) -> None:
    """The command ends with exit code 0."""
    root = Path(loaded[0].data.root)
    scene = min(path.name for path in (root / "posed_images").iterdir())
    (tmp_path / "posed_images").symlink_to(root / "posed_images")
    (tmp_path / "ScanQA").mkdir()
    question = {"scene_id": scene, "question_id": "test-0", "question": "What color is it?", "answers": None}
    (tmp_path / "ScanQA" / "ScanQA_v1.0_test_wo_obj.json").write_text(json.dumps([question]))
    options = TaskOptions("scanqa", "test_wo_obj", "video3dllm", FrameOptions("uniform", 2))
    folder = prepare(tmp_path, options, tmp_path / "prepared", quiet=True).folder
    words = ["--checkpoint", trained, "--root", tmp_path, "--data", folder, "--out", tmp_path, "--max_new_tokens", 2]
    assert evaluate_main([str(word) for word in words]) == 0
    (line,) = (tmp_path / "predictions-scanqa-fused.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "test-0" and json.loads(line)["tokens"]
    scores = json.loads((tmp_path / "scores-scanqa-fused.json").read_text())
    assert (scores["protocols"], scores["not_scored"], scores["samples"]) == ({}, NOT_SCORED, 1)


def test_the_command_scores_saved_answers_with_several_protocols(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(trained, tmp_path, EvaluationOptions(max_new_tokens=4, limit=2))
    file = str(tmp_path / "predictions-scanrefer-fused.jsonl")
    words = ["--protocol", "vgllm", "--local_rank=0", "--protocol=video3dllm", "--score-only", file]
    capsys.readouterr()
    assert evaluate_main(words) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores["protocols"]) == ["scanrefer/vgllm", "scanrefer/video3dllm"] and scores["samples"] == 2
    with pytest.raises(ValueError, match="--score_only needs no --checkpoint"):
        evaluate_command(checkpoint=trained, score_only=Path(file))
    with pytest.raises(ValueError, match="pass a run, a checkpoint or an adapter with --checkpoint"):
        evaluate_command()


def test_a_run_and_its_last_checkpoint_give_equal_answers(loaded: Any, trained: Path) -> None:
    _, other, _ = load_trained_model(trained / "checkpoints" / f"step-{STEPS:06d}")
    ours, theirs = loaded[1].state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def torn_copy(trained: Path, folder: Path) -> Path:
    """The last checkpoint's folder in a copy of the run, without DeepSpeed's shards."""
    shutil.copytree(trained, folder / "run", ignore=shutil.ignore_patterns("engine"))
    return folder / "run" / "checkpoints" / f"step-{STEPS:06d}"


def test_a_checkpoint_without_manifest_raises(trained: Path, tmp_path: Path) -> None:
    torn = torn_copy(trained, tmp_path)
    (torn / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=rf"{torn.name} holds no complete checkpoint \(checkpoint.json is missing\)"):
        evaluate(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_checkpoint_with_truncated_tensors_raises(trained: Path, tmp_path: Path, damage: str) -> None:
    file = torn_copy(trained, tmp_path) / "trainable.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    if damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{file} .*copy the checkpoint again"):
        evaluate(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("option", ["limit", "batch_size", "max_new_tokens"])
def test_numbers_out_of_range_are_rejected_before_loading(option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option} is -1; it must be at least"):
        EvaluationOptions(**{option: -1})  # type: ignore[arg-type]


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no complete checkpoint"):
        evaluate(tmp_path, tmp_path / "out")


@pytest.fixture(scope="module")
def elsewhere(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of data and models on another machine, as options of the evaluation."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("scenes", "vlm", "vggt"):
        shutil.copytree(world.folder / name, folder / name)
    return {"root": str(folder / "scenes"), "vlm": str(folder / "vlm"), "geometry_path": str(folder / "vggt")}


@pytest.fixture(scope="module")
def moved_runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run and its adapter as from a machine with other data and model paths."""
    folder = tmp_path_factory.mktemp("moved_runs")
    run, adapter = folder / "run", export_adapter(trained, folder / "adapter")
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("engine"))
    home = str(trained.parent)
    for file in (find_checkpoint(run) / "config.yaml", adapter / "w2r2_card.json", adapter / "adapter_config.json"):
        text = file.read_text()
        assert home in text
        file.write_text(text.replace(home, "/another/machine"))
    return [run, adapter]


def test_data_and_models_can_be_relocated(
    moved_runs: list[Path], elsewhere: dict[str, str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate(trained, tmp_path / "home", EvaluationOptions(max_new_tokens=8, limit=2))
    options = [text for name, value in elsewhere.items() for text in (f"--{name}", value)]
    for index, other in enumerate(moved_runs):
        out = tmp_path / str(index)
        named = ["--checkpoint", str(other), "--out", str(out), "--limit", "2", "--max_new_tokens", "8"]
        assert evaluate_main([*named, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        (place,) = found["data"]
        assert place["path"].startswith(elsewhere["root"]) and place["manifest"] == scores["data"][0]["manifest"]
        run = found["run"] if index else scores["run"]  # the weights of an adapter are in other files
        assert found == scores | {"checkpoint": str(other), "data": [place], "run": run}
        assert {**run, "weights": ""} == {**scores["run"], "weights": ""}
        predictions = [folder / "predictions-scanrefer-fused.jsonl" for folder in (out, tmp_path / "home")]
        assert predictions[0].read_text() == predictions[1].read_text()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("omitted", ["root", "vlm", "geometry_path"])
def test_moved_paths_that_are_not_given_are_named(
    moved_runs: list[Path], elsewhere: dict[str, str], tmp_path: Path, index: int, omitted: str
) -> None:
    places = {name: place for name, place in elsewhere.items() if name != omitted}
    named = {"root": "/another/machine/scenes", "vlm": "/another/machine/vlm", "geometry_path": "/another/machine/vggt"}
    with pytest.raises(ValueError, match=named[omitted]):
        evaluate(moved_runs[index], tmp_path, EvaluationOptions(limit=1, **places))


def test_a_truncated_frame_raises_before_the_first_answer(
    loaded: Any, elsewhere: dict[str, str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "scenes"
    shutil.copytree(elsewhere["root"], root)
    data = replace(loaded[0].data, root=str(root))
    frame = load_mixture(data, "val")[-1].frames[-1]
    frame.write_bytes(frame.read_bytes()[: frame.stat().st_size // 2])
    monkeypatch.setattr("w2r2_ds.evaluation.runner.answer_remaining", lambda *_: pytest.fail("an answer was generated"))
    with pytest.raises(ValueError, match=f"Frame {frame} cannot be read"):
        evaluate(trained, tmp_path / "out", EvaluationOptions(root=root))
