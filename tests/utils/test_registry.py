"""Registries: duplicate names, unknown names, and built-in values that are imported on first use."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from w2r2_ds.utils.registry import Registry


class One:
    pass


class Other:
    pass


def test_names_are_kept_in_the_order_of_registration() -> None:
    registry: Registry[type] = Registry("model.part")
    assert registry.register("one", One) is One
    registry.register("another", Other)
    assert list(registry) == ["one", "another"]
    assert registry.find("one") is One and registry.find("another") is Other


@pytest.mark.parametrize(("first", "second"), [(One, Other), (One(), Other())])
def test_a_name_that_is_taken(first: object, second: object) -> None:
    registry: Registry[object] = Registry("model.part")
    registry.register("one", first)
    with pytest.raises(ValueError, match=rf"{__name__}: model\.part 'one'"):
        registry.register("one", second)
    assert registry.find("one") is first


def test_a_class_that_is_imported_twice_replaces_itself() -> None:
    registry: Registry[type] = Registry("model.part")
    again = type("One", (), {})
    registry.register("one", One)
    assert registry.register("one", again) is again
    assert registry.find("one") is again


def test_an_unknown_name() -> None:
    registry: Registry[type] = Registry("model.part", {"first": "no_such_module"})
    registry.register("margin", One)
    message = r"is 'marign'; .*first, margin \(did you mean margin\?\).*--plugin"
    with pytest.raises(ValueError, match=rf"^model\.part {message}"):
        registry.find("marign")
    with pytest.raises(ValueError, match=rf"^{re.escape('here/config.json')}: part {message}"):
        registry.find("marign", "here/config.json: part")
    with pytest.raises(ValueError, match=r"is ''; .*first, margin,"):
        registry.find("")


def test_a_built_in_value_is_imported_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built_in_part.py").write_text(
        f"import {__name__} as tests\n\nclass Part:\n    pass\n\ntests.REGISTRY.register('part', Part)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    REGISTRY.clear()
    with pytest.raises(ValueError, match=r"model\.part 'part'"):
        REGISTRY.register("part", One)  # from another module, and before the built-in one is imported
    assert "built_in_part" not in sys.modules
    assert REGISTRY.find("part").__module__ == "built_in_part"


REGISTRY: Registry[type] = Registry("model.part", {"part": "built_in_part"})
