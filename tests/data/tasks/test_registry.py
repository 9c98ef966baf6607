"""A task added by one file outside the package: prepared, read back, and found by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hand_records import ROOT, grounding
from hand_scene import SCENE
from prepared_sets import write_prepared
from w2r2_ds.commands.prepare import COMMANDS, main
from w2r2_ds.commands.prepare_data import TASK_OPTIONS, task_parser
from w2r2_ds.config.schema import DataConfig, SourceConfig
from w2r2_ds.data.dataset import PreparedSet
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.loader import load_mixture
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.tasks.base import TASKS, Task, TaskOptions, find_task, register_task
from w2r2_ds.objective.text_similarity import text_similarity

COUNTING = '''
"""Counting: how many objects of a name a scene has. Annotations: counting/SPLIT.json."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from w2r2_ds.data.frames.selection import choose
from w2r2_ds.data.sources.validation import Name, Number, Record, SceneId, validate
from w2r2_ds.data.tasks.base import Source, Task, register_task
from w2r2_ds.data.tasks.common import frame_fields
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.json_io import read_json


class Count(Record):
    scene_id: SceneId
    name: Name
    count: Number
    where: str = ""
    object_ids: tuple[int, ...] = ()

    @property
    def key(self):
        return f"{self.scene_id}|{self.name}"


@register_task
class Counting(Task):
    name = "counting"
    cli_options = ("frames",)

    def annotations(self, root, options):
        return Source("annotations", root / "counting" / f"{options.split}.json", "your own")

    def read(self, root, options):
        path = self.annotations(root, options).path
        return validate(TypeAdapter(list[Count]), read_json(path), path, counted=True)

    def make(self, scene, job, options):
        made = []
        for number, item in job.items:
            frames = [scene.frames[i] for i in choose(options.frames, scene, item.key, None)]
            question, answer = f"How many {item.name}s are there?", str(item.count)
            texts = {"question": question, "answer": answer}
            made.append((number, Sample(item.key, self.name, scene.scene_id, **frame_fields(frames), **texts)))
        return made

    def parse(self, text, frame_count):
        return int(text)

    def text_similarity(self, prediction, reference):
        return 1 / (1 + abs(int(prediction) - int(reference))) if prediction.isdecimal() else 0.0
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "counting_task.py"
    file.write_text(COUNTING)
    return file


def test_a_task_from_one_file(root: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2r2_ds.data.tasks.base.TASKS", dict(TASKS))
    (root / "counting").mkdir()
    entries = [{"scene_id": SCENE, "name": name, "count": count} for name, count in (("chair", 2), ("lamp", 0))]
    (root / "counting" / "train.json").write_text(json.dumps(entries))
    options = TaskOptions("counting", "train", frames=FrameOptions("uniform", 2))
    words = ["--root", str(root), "--splits", "[train]", "--frames.count", "2", "--out", str(root / "by_command")]
    assert main(["counting", *words, "--plugin", str(plugin)]) == 0
    assert len(PreparedSet(root / "by_command" / "train", root)) == 2
    done = prepare(root, options, root / "out", workers=2, quiet=True)
    made = PreparedSet(done.folder, root)
    assert [(each.task, each.question, each.answer, each.kind) for each in made] == [
        ("counting", "How many chairs are there?", "2", "answer"),
        ("counting", "How many lamps are there?", "0", "answer"),
    ]
    assert [path.name for path in made[0].frames] == ["00000.jpg", "00002.jpg"]
    assert [find_task("counting").parse(each.answer, 2) for each in made] == [2, 0]
    assert prepare(root, options, root / "out", quiet=True).reused
    answers, tasks, kinds = zip(*((each.answer, each.task, each.kind) for each in made), strict=True)
    for configured in ("exact_match", "token_f1"):  # the task's own similarity is used whichever is configured
        assert text_similarity(["3", "none"], answers, tasks, kinds, "rouge_l", configured).tolist() == [0.5, 0.0]


def test_a_task_that_is_not_registered_is_an_error_before_training(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [replace(grounding(), task="counting")], ROOT)
    with pytest.raises(ValueError, match=r"'counting'.*--plugin"):
        load_mixture(DataConfig(root=str(ROOT), train=[SourceConfig(str(folder))]), "train")


def test_unknown_and_repeated_names() -> None:
    with pytest.raises(ValueError, match=r"'colouring'.*scanrefer"):
        find_task("colouring")

    class Another(Task):
        name = "scanrefer"

    with pytest.raises(ValueError, match="'scanrefer'"):
        register_task(Another)


def test_the_command_line_lists_the_built_in_tasks() -> None:
    """The list of ``w2r2 prepare --help``, which imports no task, and the options that each task takes."""
    for name, task in TASKS.items():
        assert (task.__doc__ or "").partition("\n")[0].rstrip(".").lower() == COMMANDS[name].lower(), name
        assert set(task.cli_options) <= set(TASK_OPTIONS), name
        options = {action.dest.partition(".")[0] for action in task_parser(name)._actions}
        assert options.isdisjoint({*TASK_OPTIONS} - {*task.cli_options}), name
        assert options >= {"root", "splits", *task.cli_options}, name
