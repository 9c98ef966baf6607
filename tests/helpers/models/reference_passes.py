"""Reference implementation of the two passes and the loss with the stock model, one sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from encoder_inputs import geometry_images, pixel_values
from w2r2_ds.config.schema import ObjectiveConfig
from w2r2_ds.models.merger import pair_frames
from w2r2_ds.objective.expected_box import expected_overlap
from w2r2_ds.objective.push_inputs import Overlaps, PushInputs, States
from w2r2_ds.objective.push_terms import build_push_term
from w2r2_ds.training.two_pass import without_dropout


def visual_tokens(model: Any, batch: Any, geometry: str, partners: Sequence[int | None] | None = None) -> Tensor:
    """``[tokens, hidden]`` visual tokens with `add` fusion.

    Args:
        geometry: ``none``: 2D tokens only; ``features``: with merged geometry features; ``zeros``: with merged zeros.
        partners: per sample with frames, the index of the one whose merged geometry it gets, or None for zeros; None
            for the own geometry.
    """
    tower = model.base.model.visual(pixel_values(batch.visuals), grid_thw=batch.visuals.grid_thw).pooler_output.detach()
    if geometry == "none":
        return tower
    features = [model.geometry.encode(images) for images in geometry_images(batch.visuals)]
    if batch.visuals.kind == "video":
        features = [pair_frames(one) for one in features]
    if geometry == "zeros":
        features = [torch.zeros_like(one) for one in features]
    merged = [model.geometry_merger([one]) for one in features]
    if partners is not None:
        merged = [
            torch.zeros_like(own) if partner is None else merged[partner]
            for own, partner in zip(merged, partners, strict=True)
        ]
    return tower + torch.cat(merged)


def hidden_states(model: Any, batch: Any, tokens: Tensor) -> Tensor:
    """``[batch, length, hidden]`` last hidden states; text embeddings and visual tokens are combined here."""
    base = model.base
    embeddings = base.get_input_embeddings()(batch.input_ids)
    if not batch.visuals.dummy:
        embeddings = embeddings.masked_scatter((batch.token_types > 0)[..., None].expand_as(embeddings), tokens)
    return base.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def hand_loss(
    model: Any,
    batch: Any,
    config: ObjectiveConfig,
    tables: Any,
    s_short: list[float],
    partners: Sequence[int | None] | None = None,
) -> Tensor:
    """Sum over samples of cross-entropy and push term (`add` fusion, `reduction: sample`).

    Args:
        s_short: score s of each sample's shortcut answer.
        partners: see `visual_tokens`, for the shortcut pass of a push term that needs the geometry of another scene.
    """
    term = build_push_term(config.push_term)
    fused = hidden_states(model, batch, visual_tokens(model, batch, "features"))
    with torch.no_grad() if term.stop_gradient else nullcontext():
        geometry = {"merged": "none", "features": "zeros"}[model.zero_geometry]
        if partners is not None:
            geometry = "features"
        short = hidden_states(model, batch, visual_tokens(model, batch, geometry, partners))
        logits_short = model.base.lm_head(short[batch.answer_positions.sample, batch.answer_positions.position])
    rows = batch.answer_positions
    logits = model.base.lm_head(fused[rows.sample, rows.position])
    log_p, log_p_short = logits.log_softmax(-1), logits_short.log_softmax(-1)
    _, giou, has_box = expected_overlap(log_p, batch, tables)
    iou_short, _, _ = expected_overlap(log_p_short, batch, tables)
    set_of_sample = batch.frame_set_of_sample.tolist()
    has_partner = torch.tensor(
        [partners is not None and own >= 0 and partners[own] is not None for own in set_of_sample]
    )
    total = torch.zeros(())
    for index, s in enumerate(s_short):
        mine = rows.sample == index
        align = cross_entropy(logits[mine], rows.label[mine])
        where, what = (
            rows.position[mine][rows.where[mine]],
            batch.description_positions.position[batch.description_positions.sample == index],
        )
        positions = torch.cat([where, what])
        inputs = PushInputs(
            log_p=log_p[mine],
            label=rows.label[mine],
            prediction_short=logits_short[mine].argmax(-1),
            label_log_p_short=log_p_short[mine].gather(1, rows.label[mine][:, None])[:, 0],
            prediction_log_p_short=log_p_short[mine].max(-1).values,
            sample=torch.zeros_like(rows.label[mine]),
            where=rows.where[mine],
            cross_entropy=align[None],
            hinge=torch.tensor([max(0.0, s - config.mu)]),
            lambda_det=config.lambda_det,
            mu=config.mu,
            log_p_short=log_p_short[mine],
            states=States(
                fused=fused[index, positions],
                short=short[index, positions],
                sample=torch.zeros_like(positions),
                where=torch.arange(len(positions)) < len(where),
                what=torch.arange(len(positions)) >= len(where),
            ),
            overlaps=Overlaps(giou[index : index + 1], iou_short[index : index + 1], has_box[index : index + 1]),
            has_other=None if partners is None else has_partner[index : index + 1],
        )
        total = total + align + term(inputs).sum()
    return total


def shortcut_of(step: Any, batch: Any, visual: Any, features: Any) -> Any:
    """Outputs of the shortcut pass, without the fused pass."""
    with step.shortcut_context():
        shortcut_visual = step.fuse_shortcut(visual, features)
        answers = step.decode(batch, shortcut_visual) if step.objective.shortcut_decode == "greedy" else None
    with step.shortcut_context(), without_dropout(step.dropouts):
        states = step.model.answer_hidden_states(batch, shortcut_visual, step.push_term.needs_states)
    return step.shortcut_outputs(batch, states, answers)
