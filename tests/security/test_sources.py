"""The sources have no call that runs untrusted code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("w2r2_ds", "launchers", "slurm", "docs") for path in sorted((ROOT / folder).rglob("*"))]
PYTHON = [path for path in FILES if path.suffix == ".py"]
SHELL = [path for path in FILES if path.suffix in (".sh", ".sbatch", ".env")]

MUST_BE = {
    "trust_remote_code": False,
    "allow_pickle": False,
    "weights_only": True,
    "use_safetensors": True,
    "shell": False,
}
"""Arguments that must have this literal value."""
NEVER = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "shutil.unpack_archive"),
    *(f"pickle.{name}" for name in ("load", "loads", "Unpickler")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")),
}
NEEDED = {"torch.load": "weights_only", "console.print": "markup", "TextColumn": "markup"}
"""Calls that must have this argument: without it, some versions read pickles, and rich parses markup in texts."""
NEVER_IMPORTED = {"dill", "cloudpickle", "joblib", "marshal", "shelve"}
ALLOWED = {
    "w2r2_ds/data/sources/numpy_unpickler.py: pickle.Unpickler",  # its subclass, with an allow-list
    "w2r2_ds/demo/synthetic/annotations.py: pickle.loads",  # of what the same line has dumped
}


def forbidden(tree: ast.AST) -> Iterator[str]:
    """The forbidden calls in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.partition(".")[0] in NEVER_IMPORTED)
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml"):
                yield f"from {node.module}"
        if isinstance(node, ast.ClassDef):
            yield from (name for base in node.bases if (name := dotted(base)) in NEVER)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in NEVER or name.endswith(".extractall"):
            yield name
        for argument, value in MUST_BE.items():
            if argument in given and not (isinstance(given[argument], ast.Constant) and given[argument].value is value):  # type: ignore[attr-defined]
                yield f"{name}({argument}=...)"
        texts = any(isinstance(each, ast.Constant | ast.JoinedStr | ast.BinOp) for each in node.args)
        if name in NEEDED and NEEDED[name] not in given and (texts or name == "torch.load"):
            yield f"{name} without {NEEDED[name]}"


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name; of any other expression, the attributes after it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_has_forbidden_calls(path: Path) -> None:
    name = path.relative_to(ROOT)
    hits = {f"{name}: {each}" for each in forbidden(ast.parse(path.read_text(encoding="utf-8")))}
    assert not hits - ALLOWED, "a reader takes data only (SECURITY.md)"


def test_no_script_evaluates_its_arguments() -> None:
    hits = [
        f"{path}: {line}" for path in SHELL for line in path.read_text().splitlines() if re.match(r"\s*eval\s", line)
    ]
    assert not hits


def test_every_module_is_checked() -> None:
    names = {str(path.relative_to(ROOT)) for path in PYTHON}
    assert {
        "w2r2_ds/models/weights/loading.py",
        "w2r2_ds/training/checkpoint/save.py",
        "launchers/train.py",
    } <= names


@pytest.mark.parametrize(
    "line",
    [
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "load(trust_remote_code=config.trust)",
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "subprocess.run(f'rm {name}', shell=True)",
        "os.system(command)",
        "pickle.load(file)",
        "from pickle import load",
        "class Reader(pickle.Unpickler): ...",
        "import dill",
        "eval(text)",
        "tarfile.open(path).extractall(folder)",
        "from_pretrained(name, use_safetensors=None)",
        "console.print(f'{sample.id}')",
        "TextColumn('{task.description}')",
    ],
)
def test_forbidden_calls_are_detected(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "from_pretrained(name, trust_remote_code=False, use_safetensors=True)",
        "yaml.safe_load(text)",
        "torch.load(path, weights_only=True)",
        "console.print(table)",
        "subprocess.run([program, name])",
    ],
)
def test_harmless_calls_are_not_reported(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))
