"""The files of examples/: a plug-in push term, a custom data set and a script."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from w2r2_ds.objective import push_terms

EXAMPLES = Path(__file__).parents[1] / "examples"


@patch.dict(push_terms.PUSH_TERMS)
def test_the_push_term_is_registered_and_gated() -> None:
    runpy.run_path(str(EXAMPLES / "custom_push_term.py"))
    assert push_terms.PUSH_TERMS["focal"].gated
    with pytest.raises(ValueError, match="gamma"):
        push_terms.build_push_term({"name": "focal", "gamma": -1.0})


def test_a_question_without_an_answer_raises_with_its_line(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    record = {"scene": "scene0000_00", "question": "How many?"}
    questions.write_text(json.dumps(record | {"answers": []}))
    entries = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["scanqa_entries"]
    with pytest.raises(ValueError, match=r"line 1.*answers"):
        entries(questions)
    questions.write_text(json.dumps(record | {"answers": ["2"]}))
    assert entries(questions)[0]["answers"] == ["2"]
    line = json.dumps(record | {"answers": ["2"], "question": "a\u2028b"}, ensure_ascii=False)
    questions.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n{line}\n\n".encode())
    assert [each["question_id"] for each in entries(questions)] == ["custom-1", "custom-3"]
    questions.write_text(f"{line}\n{{")
    with pytest.raises(ValueError, match=r"questions.jsonl: line 2 is not valid JSON"):
        entries(questions)


def test_the_script_prints_its_commands() -> None:
    script = EXAMPLES / "train_scanrefer_3b.sh"
    environment = os.environ | {"DRY_RUN": "1"}
    done = subprocess.run(["bash", str(script), "data/x"], env=environment, capture_output=True, text=True, check=True)
    assert "+ deepspeed launchers/train.py" in done.stdout
    assert done.stdout.count("evaluate.py") == 3


@patch.dict(push_terms.PUSH_TERMS)
def test_focal_is_zero_if_the_hinge_is_zero() -> None:
    from types import SimpleNamespace

    focal = runpy.run_path(str(EXAMPLES / "custom_push_term.py"))["Focal"]()
    inputs = SimpleNamespace(cross_entropy=torch.tensor([1.0, 1.0]), hinge=torch.tensor([0.0, 0.2]), lambda_det=1.5)
    term = focal(inputs)
    assert term[0] == 0 and term[1] > 0
