"""A rank's random state: saved with a checkpoint, set again by a resume."""

from __future__ import annotations

import hashlib

import torch


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's random state."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Go on with a saved random state."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_afresh(seed: int, rank: int, step: int) -> None:
    """The random state of a rank for which a checkpoint has none: another one for each rank and step."""
    word = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:8]
    torch.manual_seed(int.from_bytes(word, "little") >> 1)
