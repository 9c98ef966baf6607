"""Commands: --help without heavy imports, plug-ins, errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fork_server import ROOT, environment
from w2r2_ds import __version__
from w2r2_ds.commands import COMMANDS, bench, convert, main, prepare
from w2r2_ds.training.fault_tolerance.exit_codes import FAILED
from w2r2_ds.utils import plugins
from w2r2_ds.utils.plugins import import_plugins

HEAVY = ("torch", "deepspeed", "transformers", "peft", "accelerate")
"""Libraries whose import takes seconds; a command imports them only after its command line is parsed."""
SUBCOMMANDS = {"prepare": prepare.SUBCOMMANDS, "convert": convert.CONVERSIONS, "bench": bench.BENCHMARKS}
"""Command -> its sub-commands."""
WITH_HELP = [*COMMANDS, *(f"{command} {name}" for command, names in SUBCOMMANDS.items() for name in names)]
"""Every command and sub-command, as typed after `w2r2`."""


def heavy_imports(steps: dict[str, str]) -> dict[str, list[str]]:
    """Run code in a new process: name of a step -> heavy libraries that are imported after it, if there are any."""
    program = f"""
import json, runpy, sys
loaded = {{}}
for name, code in {steps}.items():
    try:
        exec(code)
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
    loaded[name] = [library for library in {HEAVY} if library in sys.modules]
print(json.dumps(loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded.keys() == steps.keys()
    return {name: libraries for name, libraries in loaded.items() if libraries}


def test_the_package_imports_no_heavy_library() -> None:
    assert heavy_imports({"import": "import w2r2_ds, w2r2_ds.commands, w2r2_ds.config.io"}) == {}


def test_help_imports_no_heavy_library() -> None:
    """Of no command and no sub-command."""
    main = "from w2r2_ds.commands import main; main"
    assert heavy_imports({words: f"{main}({[*words.split(), '--help']})" for words in WITH_HELP}) == {}


def test_help_of_a_launcher_imports_no_heavy_library() -> None:
    steps = {}
    for words in WITH_HELP:
        command, *rest = words.split()
        argv = [f"launchers/{command}.py", *rest, "--help"]
        steps[words] = f"sys.argv = {argv}; runpy.run_path({argv[0]!r}, run_name='__main__')"
    assert heavy_imports(steps) == {}


def test_heavy_imports_are_found() -> None:
    assert heavy_imports({"light": "import json", "heavy": "import torch"}) == {"heavy": ["torch"]}


@pytest.mark.parametrize("words", WITH_HELP)
def test_an_option_with_a_default_is_not_required(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"\(required[^)]*default: (?!null)[^)]*\)", text) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_and_a_launcher(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: w2r2 {command}") and "--plugin" in text
    assert (ROOT / "launchers" / f"{command}.py").is_file()
    listed = re.findall(r"^ {4}([\w-]+) {2,}", text.partition("ubcommands:")[2], re.MULTILINE)
    assert listed == list(SUBCOMMANDS.get(command, []))


@pytest.mark.parametrize(
    ("words", "options"), [("export", "--checkpoint, --out"), ("prepare boxes", "--root"), ("train", "--deepspeed")]
)
def test_a_missing_option_is_named(words: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 1
    assert f": {options};" in capsys.readouterr().err


def test_w2r2_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert main([]) == 1 and main(["trian"]) == 1
    assert "'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("w2r2 export: ") and str(tmp_path) in error and "Traceback" not in error


def test_plugins_are_imported_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and an installed module. Other command line arguments are unchanged."""
    (tmp_path / "first.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Options:\n    value: int = 1\n"
    )
    (tmp_path / "second_plugin.py").write_text("import sys\nassert 'w2r2_plugin_first' in sys.modules\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "IMPORTED", [])
    words = ["--plugin", str(tmp_path / "first.py"), "--train.steps", "3", "--plugin=second_plugin", "--out", "x"]
    assert import_plugins(words) == ["--train.steps", "3", "--out", "x"]
    assert sys.modules.pop("w2r2_plugin_first").Options().value == 1
    assert [str(tmp_path / "first.py"), "second_plugin"] == plugins.IMPORTED


@pytest.mark.parametrize("target", ["nowhere.py", "no_such_package.module", ""])
def test_a_plugin_that_does_not_exist(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--plugin", target]) == FAILED
    error = capsys.readouterr().err
    assert "--plugin" in error and target in error


def test_a_plugin_with_an_error_keeps_its_traceback(tmp_path: Path) -> None:
    """The traceback has the failing line of the plug-in."""
    (tmp_path / "broken.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        import_plugins(["--plugin", str(tmp_path / "broken.py")])


def test_hyphens_in_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "missing.jsonl"
    assert main(["evaluate", "--score-only", str(file)]) == FAILED
    assert str(file) in capsys.readouterr().err


def test_launchers_run_their_commands() -> None:
    done = subprocess.run(
        [sys.executable, "launchers/export.py", "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: w2r2 export")
