"""Registries: duplicate names, unknown names, and built-in values that are imported on first use."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

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


def test_a_file_that_is_imported_twice_replaces_its_values(tmp_path: Path) -> None:
    """As a plug-in file and as a module; a file with a class of the same name does not."""
    registry: Registry[object] = Registry("model.part")
    for name in ("part", "other"):
        (tmp_path / f"{name}.py").write_text("class Part:\n    pass\n\nfirst, second = lambda: 1, Part()\n")
    once, again, other = (load(tmp_path / file, name) for file, name in PARTS)
    for part in ("Part", "second", "first"):
        registry.register(part, getattr(once, part))
        assert registry.register(part, getattr(again, part)) is getattr(again, part)
        with pytest.raises(ValueError, match=rf"model\.part '{part}'"):
            registry.register(part, getattr(other, part))
        assert registry.find(part) is getattr(again, part)


def load(file: Path, name: str) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARTS = (("part.py", "test_registry_part"), ("part.py", "test_registry_plugin"), ("other.py", "test_registry_other"))


@pytest.mark.parametrize("name", [5, None, True, 1.5, ["margin"]])
def test_a_name_of_another_type(name: object) -> None:
    with pytest.raises(ValueError, match=r"model\.part is .*margin"):
        Registry("model.part", {"margin": "no_such_module"}).find(name)  # type: ignore[arg-type]


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
