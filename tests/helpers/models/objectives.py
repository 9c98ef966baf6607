"""Build objective configurations from flat keywords: push term, its hyper-parameters, other fields."""

from __future__ import annotations

from typing import Any

from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.objective.push_terms import PUSH_TERMS, PushTerm, build_push_term

HYPER_PARAMETERS = ("margin", "iou_margin", "cosine")


def objective_config(push: str = "margin", **changes: Any) -> ObjectiveConfig:
    """`objective_config(push="soft_iou", iou_margin=0.3, mu=0.1)`; hyper-parameters of other push terms are ignored."""
    given = {name: changes.pop(name) for name in HYPER_PARAMETERS if name in changes}
    own = {name: value for name, value in given.items() if name in PUSH_TERMS[push].model_fields}
    return ObjectiveConfig(push_term={"name": push, **own}, **changes)


def push_term(name: str, **hyper_parameters: Any) -> PushTerm:
    """A registered push term with the given hyper-parameters."""
    return build_push_term({"name": name, **hyper_parameters})
