"""What saved answers depend on: the code of plug-ins that define a part of the model, but no other code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.evaluation import plan
from w2r2_ds.evaluation.conditions import find_condition
from w2r2_ds.models.build import plugin_code
from w2r2_ds.models.fusion import FUSIONS
from w2r2_ds.utils import plugins

FUSION = """from w2r2_ds.models.fusion import FUSIONS, Add

class Scaled(Add):
    pass

FUSIONS.register("scaled", Scaled)
"""


def test_answers_of_an_edited_plugin_are_not_reused(
    model_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "IMPORTED", [])
    monkeypatch.setattr(plan, "trained_weights_sha256", lambda path: "weights")
    file = tmp_path / "scaled.py"

    def identity(fusion: str) -> dict[str, Any]:
        config = RunConfig(model=replace(model_config, fusion=fusion))
        return plan._run_identity(tmp_path, config, [], find_condition("fused"), 8)

    with patch.dict(FUSIONS):
        file.write_text(FUSION)
        plugins.import_plugin(str(file))
        own, built_in = identity("scaled"), identity("add")
        file.write_text(FUSION + "# edited\n")
        plugins.import_plugin(str(file))
        edited = identity("scaled")
        assert identity("add") == built_in and "code" not in built_in and plugin_code(model_config) == {}
    assert set(own["code"]) == {"model.fusion"} and own["code"] != edited["code"]
    assert own | {"code": {}} == edited | {"code": {}}
