"""A task from one file outside the package: registered, prepared and read. evaluation/test_plugin_task.py scores it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from hand_records import ROOT, grounding
from hand_scene import SCENE
from prepared_sets import write_prepared
from w2r2_ds.commands.prepare import SUBCOMMANDS, main
from w2r2_ds.commands.prepare_data import TASK_OPTIONS, task_parser
from w2r2_ds.config.schema import DataConfig, SourceConfig
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.tasks.base import TASKS, TaskOptions, register_task
from w2r2_ds.data.tasks.scanqa import ScanQA
from w2r2_ds.evaluation.protocols.registry import PROTOCOLS
from w2r2_ds.objective.text_similarity import text_similarity

PLUGIN = Path(__file__).parents[3] / "examples" / "custom_task.py"


@patch.dict(TASKS)
@patch.dict(PROTOCOLS)
def test_a_task_from_one_file(root: Path) -> None:
    (root / "counting").mkdir()
    entries = [{"scene_id": SCENE, "name": name, "count": count} for name, count in (("chair", 2), ("lamp", 0))]
    (root / "counting" / "train.json").write_text(json.dumps(entries))
    options = TaskOptions("counting", "train", frames=FrameOptions("uniform", 2))
    words = ["--root", str(root), "--splits", "[train]", "--frames.count", "2", "--out", str(root / "by_command")]
    assert main(["counting", *words, "--plugin", str(PLUGIN)]) == 0
    assert len(PreparedSet(root / "by_command" / "train", root)) == 2
    done = prepare(root, options, root / "out", workers=2, quiet=True)
    made = PreparedSet(done.folder, root)
    assert [(each.task, each.question, each.answer, each.kind) for each in made] == [
        ("counting", "How many chairs are there?", "2", "answer"),
        ("counting", "How many lamps are there?", "0", "answer"),
    ]
    assert [path.name for path in made[0].frames] == ["00000.jpg", "00002.jpg"]
    assert [TASKS.find("counting").parse(each.answer, 2) for each in made] == [2, 0]
    assert prepare(root, options, root / "out", quiet=True).reused
    answers, tasks, kinds = zip(*((each.answer, each.task, each.kind) for each in made), strict=True)
    for configured in ("exact_match", "token_f1"):  # the task's own similarity is used whichever is configured
        assert text_similarity(["3", "none"], answers, tasks, kinds, "rouge_l", configured).tolist() == [0.5, 0.0]


def test_a_task_that_is_not_registered_is_an_error_before_training(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [replace(grounding(), task="counting")], ROOT)
    with pytest.raises(ValueError, match=r"'counting'.*--plugin"):
        load_mixture(DataConfig(root=str(ROOT), train=[SourceConfig(str(folder))]), "train")


def test_unknown_and_duplicate_names_raise() -> None:
    with pytest.raises(ValueError, match=r"'colouring'.*scanrefer"):
        TASKS.find("colouring")

    class Another(ScanQA):
        name = "scanrefer"

    with pytest.raises(ValueError, match="'scanrefer'"):
        register_task(Another)


def test_the_command_line_lists_the_built_in_tasks() -> None:
    """In ``w2r2 prepare --help``, which imports no task; also the options of each task."""
    for name, task in TASKS.items():
        assert (task.__doc__ or "").partition("\n")[0].rstrip(".").lower() == SUBCOMMANDS[name].lower(), name
        assert set(task.cli_options) <= set(TASK_OPTIONS), name
        options = {action.dest.partition(".")[0] for action in task_parser(name)._actions}
        assert options.isdisjoint({*TASK_OPTIONS} - {*task.cli_options}), name
        assert options >= {"root", "splits", *task.cli_options}, name
