"""The guides "Your own data set" and "Add a task": their commands and settings, run on synthetic rooms."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from docs_scripts import DOCS
from w2r2_ds.commands.prepare import main
from w2r2_ds.config.io import load_config
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.demo.synthetic.write import Written
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDES = DOCS / "guides"


def code_blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (GUIDES / guide).read_text(), re.DOTALL)


def prepare_commands(guide: str) -> list[list[str]]:
    """Arguments of every ``launchers/prepare.py`` command of a guide."""
    lines = [line for block in code_blocks(guide, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python launchers/prepare.py")]


@pytest.fixture
def data_root(rooms: Written, tmp_path: Path) -> Path:
    """The synthetic rooms, without prepared data sets."""
    root = tmp_path / "scannet"
    root.mkdir()
    for path in rooms.root.iterdir():
        if path.name != "prepared":
            (root / path.name).symlink_to(path)
    return root


def test_own_dataset(data_root: Path) -> None:
    commands = prepare_commands("own-dataset.md")
    assert {words[0] for words in commands} == {"boxes", *TASKS}
    for words in commands:
        assert words[words.index("--root") + 1] == "data/scannet"
        words = [str(data_root) if word == "data/scannet" else word for word in words]
        # rendered frames have consecutive numbers
        assert main([*words, *(["--step", "1"] if words[0] == "detection" else [])]) == 0, words
    for task in TASKS:
        for split in ("train", "val"):
            assert len(PreparedSet(data_root / "prepared" / task / split, data_root)), task
    (block,) = code_blocks("own-dataset.md", "yaml")
    data = yaml.safe_load(block)["data"]
    words = [f"--data.{name}={json.dumps(data[name])}" for name in ("train", "val")]
    config = load_config(overrides=[*words, "--data.root", str(data_root)])
    mixture = load_mixture(config.data, "train")
    lengths = {each.task: len(each) for each in mixture.sets if isinstance(each, PreparedSet)}
    assert mixture.epoch_size == lengths["scanrefer"] + lengths["scan2cap"] // 2 + lengths["detection"]


def test_custom_dataset(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = sorted(path.name for path in (data_root / "scans").iterdir())[0]
    record = {"scene": scene, "question": "How many?", "answers": ["2"]}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(record) + "\n")
    script = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))
    out = tmp_path / "custom"
    assert script["main"]([str(questions), "--root", str(data_root), "--out", str(out), "--frames", "4"]) == 0
    (sample,) = PreparedSet(out / "prepared" / "scanqa" / "train", out)
    assert (sample.scene_id, sample.answer, len(sample.frames)) == (scene, "2", 4)


@patch.dict(TASKS)
@patch.dict(PROTOCOLS)
def test_add_a_task(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = prepare_commands("add-a-task.md")
    scenes = {path.stem: json.loads(path.read_text()) for path in (data_root / "ScanRefer").glob("*.json")}
    (data_root / "counting").mkdir()
    for name, entries in scenes.items():
        counts = [{"scene_id": scene, "name": "chair", "count": 4} for scene in {each["scene_id"] for each in entries}]
        (data_root / "counting" / f"{name.rpartition('_')[2]}.json").write_text(json.dumps(counts))
    words = [str(data_root) if word == "data/scannet" else word for word in words]
    monkeypatch.chdir(EXAMPLES.parent)
    assert main(words) == 0
    made = PreparedSet(data_root / "prepared" / "counting" / "train", data_root)
    assert {(each.question, each.answer) for each in made} == {("How many chairs are there?", "4")}
