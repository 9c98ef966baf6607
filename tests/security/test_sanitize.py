"""Untrusted text in terminals and logs, and secrets in output files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.commands import prepare as launcher
from w2r2_ds.config.cli import Parser
from w2r2_ds.config.io import from_tree, load_config
from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.evaluation.resumable import record_line
from w2r2_ds.utils.sanitize import has_secret, lines, message, one_line, without_secrets

EVIL = "chair\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\r\nstep 5  loss 0.0"
TOKEN = "hf_" + "aB3" * 11 + "x"


def test_control_characters_are_removed() -> None:
    assert one_line("a\x1b[31mb\nc\u202ed\x9be\x00") == r"a\x1b[31mb\nc\u202ed\x9be\x00"
    assert one_line("Stühle 椅子, 2 m²") == "Stühle 椅子, 2 m²"
    assert one_line("\ud800") == r"\ud800"


def test_untrusted_line_breaks_do_not_start_a_log_line() -> None:
    said = lines(f"prepare: {EVIL}\ntrain.py: done")
    assert "\x1b" not in said and "\r" not in said
    assert [line[:2] for line in said.split("\n")[1:]] == ["  ", "  "]
    assert lines("head:\n  first\n    deeper") == "head:\n  first\n    deeper", "what is indented stays as it is"


def test_predictions_have_no_control_characters() -> None:
    record = {"id": "a", "text": f"{EVIL} ü", "question": "\u2028"}
    line = record_line(record)
    assert json.loads(line) == record and line.count("\n") == 1 and "ü" in line
    assert all(char.isprintable() for char in line[:-1])


@pytest.mark.parametrize("field", ["object_name", "scene_id"])
def test_a_forged_name_does_not_reach_the_terminal(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher quotes text of an annotation file without escape sequences and line breaks."""
    entry = {"scene_id": "scene0000_00", "object_id": "1", "object_name": "chair", "ann_id": "0", "description": "x"}
    (tmp_path / "ScanRefer").mkdir()
    file = tmp_path / "ScanRefer" / "ScanRefer_filtered_train.json"
    file.write_text(json.dumps([{**entry, "token": ["x"], field: EVIL}]))
    (tmp_path / "embodiedscan").mkdir()
    (tmp_path / "embodiedscan" / "embodiedscan_infos_train.pkl").write_bytes(b"\x80\x02cos\x1b[31m\nsystem\n.")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "scanrefer", "--root", str(tmp_path), "--splits", "[train]"])
    assert launcher.main() == 1
    said = "".join(capsys.readouterr())
    assert f"field '{field}'" in said and all(char.isprintable() for char in said.replace("\n", ""))
    assert not [line for line in said.splitlines()[1:] if not line.startswith("  ")]


SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "MY_PASSWORD": "correct horse",
    "DB_PASS": "battery-staple",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.e30",
    "SHORT_KEY": "x",
    "PRIMARY_KEY": "scanrefer",
    "ROW_KEY": "posed_images_of_scenes",
    "DAY_KEY": "20240131123000",
    "SEED_KEY": "monday_42",
    "SSH_KEY": str(Path(__file__).parent),
    "GOOGLE_APPLICATION_CREDENTIALS": __file__,
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"no access with {TOKEN}", "no access with [hidden]"),
        ("https://user:s3cret@host/x and https://tok@host", "https://[hidden]@host/x and https://[hidden]@host"),
        ("key 0123456789abcdef0123456789abcdef!", "key [hidden]!"),
        ("correct horse battery", "[hidden] battery"),
        ("db at battery-staple", "db at [hidden]"),
        ("job eyJhbGciOiJIUzI1NiJ9.e30", "job [hidden]"),
        ("https://host/x?token=abc&rev=1", "https://host/x?token=[hidden]&rev=1"),
        ("https://host/x?rev=1&key=abc#top", "https://host/x?rev=1&key=[hidden]#top"),
        ("https://host/?X-Amz-Signature=0f&api_key=1", "https://host/?X-Amz-Signature=[hidden]&api_key=[hidden]"),
        ("https://host/x?monkey=abc&tokens=3 key=abc", None),
        ("prepared/scanrefer/train, posed_images_of_scenes, 20240131123000, runs/monday_42", None),
        (f"{__file__} and {Path(__file__).parent}/model", None),
        ("xylophone, runs/hf_qwen_experiment_of_monday_42, me@host", None),
    ],
)
def test_secrets_are_hidden(text: str, kept: str | None) -> None:
    assert without_secrets(text, SECRETS) == (text if kept is None else kept)
    assert has_secret(text, SECRETS) == (kept is not None)


def test_a_launcher_hides_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine-1")
    assert message(ValueError("401 for a-secret-of-mine-1")) == "401 for [hidden]"
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["--nothing=a-secret-of-mine-1", "a-secret-of-mine-1"])
    assert "a-secret" not in capsys.readouterr().err


@pytest.mark.parametrize("secret", ["https://me:s3cret@host/model", TOKEN, "a-secret-of-mine-1"])
@pytest.mark.parametrize("field", ["model.vlm", "out", "data.train"])
def test_a_saved_configuration_has_no_secrets(
    secret: str, field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So config.yaml, checkpoint.json, cards and the arguments of W&B have none: all are made of the configuration."""
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine-1")
    value = f"[{{path: '{secret}'}}]" if field == "data.train" else secret
    with pytest.raises(ValueError, match=rf"{field}(\[0\].path)? holds a key, a token or a password") as caught:
        load_config(overrides=[f"--{field}", value])
    assert secret not in str(caught.value) + capsys.readouterr().err


def test_a_saved_configuration_has_no_control_characters() -> None:
    with pytest.raises(ValueError, match=r"model.vlm is 'a\\nb', which contains"):
        RunConfig(model=ModelConfig(vlm="a\nb"))
    tree: dict[str, Any] = {"out": "runs/\x1b[31mred"}
    with pytest.raises(ValueError, match=r"out is 'runs/\\x1b\[31mred'"):
        from_tree(tree, "card.json")


def test_wandb_gets_no_repository_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's client would send the remote's URL, which may contain a token, and a patch of uncommitted changes."""
    wandb = pytest.importorskip("wandb")
    from w2r2_ds.training.trackers import WandbTracker

    told: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: told.update(given))
    WandbTracker(tmp_path / "run", 0)
    assert told.pop("settings")["disable_git"] is True
    assert set(told) == {"dir", "project", "name"}, "no configuration, no environment"


@pytest.mark.nightly
def test_wandb_files_have_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    import subprocess

    from w2r2_ds.training.trackers import WandbTracker

    git = shutil.which("git")
    assert git is not None
    token = "ghp-token-of-a-remote"
    for command in (["init", "-q"], ["remote", "add", "origin", f"https://{token}:x-oauth-basic@github.com/a/b.git"]):
        subprocess.run([git, *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_API_KEY": "5" * 40, "HF_TOKEN": "hf-token-of-mine"}.items():
        monkeypatch.setenv(name, value)
    run = WandbTracker(tmp_path, 0).run
    run.log({"loss": 1.0})
    run.finish()
    stored = [path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert stored
    for secret in (token, "5" * 40, "hf-token-of-mine"):
        assert not any(secret.encode() in content for content in stored), secret
