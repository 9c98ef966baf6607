"""Draw the push-term figures of docs/concepts/objective.md: ``python docs/scripts/figures.py [FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from w2r2_ds.objective.push_inputs import Overlaps, PushInputs, States
from w2r2_ds.objective.push_terms import PUSH_TERMS

LAM, MU = 1.5, 0.7
POINTS = 201


def inputs(points: int, **given: Any) -> PushInputs:
    """One row and one sample per point of a curve; s is 0.9 (h = 0.2) and l is 1 unless in `given`."""
    one = torch.ones(points, dtype=torch.float64)
    even = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64)).expand(points, 2)
    values: dict[str, Any] = {
        "log_p": even,
        "label": torch.zeros(points, dtype=torch.int64),
        "prediction_short": torch.ones(points, dtype=torch.int64),
        "label_log_p_short": even[:, 0],
        "prediction_log_p_short": even[:, 1],
        "sample": torch.arange(points),
        "where": one.bool(),
        "cross_entropy": one,
        "hinge": 0.2 * one,
        "lambda_det": LAM,
        "mu": MU,
        "has_other": one.bool(),
    }
    return PushInputs(**(values | given))


def log_odds(p: Tensor) -> Tensor:
    """``[points, 2]`` log probabilities of a token that has p and of all others together."""
    return torch.stack([p, 1 - p], dim=-1).log()


def over_s(name: str) -> list[tuple[str, Tensor, Tensor]]:
    """The term against s."""
    s = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    return [("", s, PUSH_TERMS[name]()(inputs(POINTS, hinge=torch.clamp(s - MU, min=0))))]


def weight(name: str) -> list[tuple[str, Tensor, Tensor]]:
    """The factor of l in the total, against s."""
    (_, s, term), *_ = over_s(name)
    return [("", s, 1 + term)]


def lead() -> list[tuple[str, Tensor, Tensor]]:
    """`margin` against the fused pass's lead in nats."""
    curves = []
    for short in (0.1, 0.4):
        p = torch.linspace(0.02, 0.98, POINTS, dtype=torch.float64)
        label_log_p_short = torch.full((POINTS,), short, dtype=torch.float64).log()
        term = PUSH_TERMS["margin"]()(inputs(POINTS, log_p=log_odds(p), label_log_p_short=label_log_p_short))
        curves.append((f"p'(y) = {short}", p, term))
    return curves


def unlikelihood() -> list[tuple[str, Tensor, Tensor]]:
    """`pseudo_label` against the fused probability of the shortcut's wrong token."""
    curves = []
    for short in (0.9, 0.5, 0.2):
        p = torch.linspace(0.0, 0.98, POINTS, dtype=torch.float64)
        prediction_log_p_short = torch.full((POINTS,), short, dtype=torch.float64).log()
        term = PUSH_TERMS["pseudo_label"]()(
            inputs(POINTS, log_p=log_odds(1 - p), prediction_log_p_short=prediction_log_p_short)
        )
        curves.append((f"p'(y') = {short}", p, term))
    return curves


def overlap() -> list[tuple[str, Tensor, Tensor]]:
    """`soft_iou` against the GIoU of the fused pass's expected box."""
    curves = []
    for short in (0.95, 0.8, 0.5):
        giou = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
        overlaps = Overlaps(giou, torch.full_like(giou, short), torch.ones_like(giou, dtype=torch.bool))
        curves.append((f"IoU(E'[b]) = {short}", giou, PUSH_TERMS["soft_iou"]()(inputs(POINTS, overlaps=overlaps))))
    return curves


def angle() -> list[tuple[str, Tensor, Tensor]]:
    """`representation` against the cosine of fused and shortcut states."""
    turn = torch.linspace(0, torch.pi, POINTS, dtype=torch.float64)
    fused = torch.stack([turn.cos(), turn.sin()], dim=-1)
    short = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(POINTS, 2)
    curves = []
    for label, where in (("what position", False), ("where position", True)):
        is_where = torch.full((POINTS,), where)
        states = States(fused, short, torch.arange(POINTS), is_where, ~is_where)
        curves.append((label, turn.cos(), PUSH_TERMS["representation"]()(inputs(POINTS, states=states))))
    return curves


def slope() -> list[tuple[str, Tensor, Tensor]]:
    """Gradient of `poe` on the logit of y, as a share of cross-entropy's, against p(y)."""
    curves = []
    for short in (0.1, 0.5, 0.9):
        p = torch.linspace(0.01, 0.99, POINTS, dtype=torch.float64)
        logits = log_odds(p).requires_grad_()
        given = log_odds(torch.full((POINTS,), short, dtype=torch.float64))
        PUSH_TERMS["poe"]()(inputs(POINTS, log_p=logits.log_softmax(-1), log_p_short=given)).sum().backward()
        assert logits.grad is not None
        curves.append((f"p'(y) = {short}", p, logits.grad[:, 0] / (LAM * (p - 1))))
    return curves


def advantage() -> list[tuple[str, Tensor, Tensor]]:
    """`contrast` against the label's log-likelihood ratio of own and other geometry."""
    ratio = torch.linspace(-1, 3, POINTS, dtype=torch.float64)
    log_q = torch.full((POINTS,), -4.0, dtype=torch.float64)
    curves = []
    for margin in (0.5, 1.0, 2.0):
        given = inputs(POINTS, log_p=log_odds((log_q + ratio).exp()), label_log_p_short=log_q)
        curves.append((f"m = {margin:g}", ratio, PUSH_TERMS["contrast"](margin=margin)(given)))
    return curves


def worse() -> list[tuple[str, Tensor, Tensor]]:
    """`unblocked` against the IoU of the shortcut's expected box."""
    iou = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    overlaps = Overlaps(iou, iou, torch.ones_like(iou, dtype=torch.bool))
    return [("", iou, PUSH_TERMS["unblocked"]()(inputs(POINTS, overlaps=overlaps)))]


PICTURES: dict[str, tuple[Callable[[], list[tuple[str, Tensor, Tensor]]], str, str]] = {
    "literal": (lambda: over_s("literal"), "s", "term (its gradient is 0)"),
    "reweight": (lambda: weight("reweight"), "s", "weight of l"),
    "downweight": (lambda: weight("downweight"), "s", "weight of l"),
    "margin": (lead, "p(y) on where tokens", "term"),
    "pseudo_label": (unlikelihood, "p(y') of the fused pass", "term"),
    "soft_iou": (overlap, "GIoU(E[b]) of the fused pass", "term"),
    "representation": (angle, "cos(z, z')", "term"),
    "poe": (slope, "p(y)", "gradient, share of CE's"),
    "contrast": (advantage, "log p(y) - log q(y), nats", "term"),
    "unblocked": (worse, "IoU(E[b]) of the shortcut", "term"),
}


def draw(folder: Path) -> list[Path]:
    """One SVG per push term; the same bytes for the same matplotlib."""
    matplotlib.rcParams |= {"svg.hashsalt": "w2r2", "svg.fonttype": "none", "font.size": 8}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (curves, x, y) in PICTURES.items():
        figure = Figure(figsize=(2.8, 2.0), layout="constrained")
        axes = figure.subplots()
        for label, xs, ys in curves():
            axes.plot(xs.detach(), ys.detach(), label=label)
        axes.set(title=name, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
        files.append(folder / f"push_{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
    return files


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "figures"):
        print(file)
