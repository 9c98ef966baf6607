"""State of torch's random generators of one rank, saved in checkpoints and restored on resume."""

from __future__ import annotations

import hashlib

import torch


def rng_state() -> dict[str, torch.Tensor]:
    """Current state of the CPU generator and, if there is one, of the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state of `rng_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def reseed(seed: int, rank: int, step: int) -> None:
    """Seed a rank whose state is not in the checkpoint (another world size); different for every rank and step."""
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:8]
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: seeds are signed
