"""Packages that are missing, that work, and that are installed but fail to import."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2r2_ds.utils.packages import import_problem


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: _ZN3c10')", "OSError('libcudart.so.12')", "1 / 0"])
def test_a_package_that_does_not_import_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    name = f"broken_{abs(hash(error))}"
    (tmp_path / f"{name}.py").write_text(error if "/" in error else f"raise {error}")
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = {"I": "ImportError: undefined symbol", "O": "OSError: libcudart", "1": "ZeroDivisionError"}[error[0]]
    assert expected in import_problem(name) and "is installed" in import_problem(name)


def test_missing_and_working_packages() -> None:
    assert import_problem("no_such_package_at_all") == "is not installed"
    assert import_problem("json") == ""
