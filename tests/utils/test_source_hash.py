"""Hashes of the code of plug-ins: files and packages, not this package."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from w2r2_ds.utils import plugins, source_hash
from w2r2_ds.utils.registry import Registry
from w2r2_ds.utils.source_hash import record_source, source_sha256


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores what an import of a plug-in changes."""
    monkeypatch.setattr(plugins, "IMPORTED", [])
    with patch.dict(sys.modules), patch.dict(plugins.SHA256, clear=True), patch.dict(source_hash._at_import):
        yield


def test_code_of_this_package_has_no_hash() -> None:
    assert source_sha256(Registry) is source_sha256(Registry("model.part")) is source_sha256(record_source) is None
    assert source_sha256(partial(record_source, "a")) is None


def test_a_file_is_hashed(tmp_path: Path) -> None:
    """Any definition in it can be registered: a class, an object, a function or a partial of one."""
    file = tmp_path / "part.py"
    file.write_text("class Part:\n    pass\n\ndef make():\n    pass\n")
    plugins.import_plugin(str(file))
    module = sys.modules["w2r2_plugin_part"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = [source_sha256(each) for each in (module.Part, module.Part(), module.make, partial(module.make))]
    assert found == [digest] * 4 and {str(file): digest} == plugins.SHA256
    file.write_text(file.read_text() + "# edited\n")
    assert source_sha256(module.Part) == digest, "this process runs the code that was imported"
    plugins.import_plugin(str(file))
    assert source_sha256(module.Part) == plugins.SHA256[str(file)] != digest


def test_all_files_of_a_package_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_extension"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (package / name).write_text("")
    (package / "inner" / "helper.py").write_text("NUMBER = 1\n")
    (package / "part.py").write_text("class Part:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.import_plugin("some_extension.part")
    part = sys.modules["some_extension.part"].Part
    digest = source_sha256(part)
    assert digest is not None and plugins.SHA256["some_extension.part"] == digest
    (package / "inner" / "helper.py").write_text("NUMBER = 2\n")
    assert source_sha256(part) == digest
    plugins.import_plugin("some_extension.part")
    assert source_sha256(part) == plugins.SHA256["some_extension.part"] != digest
