"""FLOP counts of matrix products and attention, for MFU and the cost model, and the number of LoRA parameters.

Conventions:

* A multiply-add is two operations. Only matrix products count; norms, activations, softmax and rotary positions do not.
* A backward pass computes the gradient of a product's input, and the gradient of its weights if they train. LoRA
  therefore counts 4 operations per frozen weight and token, full fine-tuning 6.
* Causal attention: *model* FLOPs count all pairs of tokens of a sample, including the half that a causal mask excludes
  (as in PaLM, appendix B, nanoGPT and torchtitan). A causal kernel executes about half of them; the cost model counts
  these with ``causal=True`` (`tokens_and_pairs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass, and of forward and backward.

    Attributes:
        forward: FLOPs of the forward pass.
        total: FLOPs of the forward and the backward pass.
    """

    forward: float = 0.0
    total: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.total + other.total)

    def __mul__(self, times: int) -> Work:
        return Work(self.forward * times, self.total * times)


def products(module: nn.Module, rows: int) -> Work:
    """FLOPs of all linear layers and convolutions of a module, each applied to `rows` tokens or patches."""
    frozen = trained = 0
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight: Any = each.weight
            size = getattr(weight, "ds_numel", weight.numel())  # a weight that ZeRO-3 has partitioned is empty
            frozen, trained = (frozen, trained + size) if weight.requires_grad else (frozen + size, trained)
    return Work(2.0 * rows * (frozen + trained), 2.0 * rows * (2 * frozen + 3 * trained))


def attention(channels: int, pairs: float) -> Work:
    """FLOPs of attention: scores and weighted values.

    Args:
        channels: number of heads * channels of a head.
        pairs: number of pairs of a query and a key.
    """
    forward = 4.0 * channels * pairs  # two products, a multiply-add each per pair and channel
    return Work(forward, 3 * forward)


def tokens_and_pairs(groups: Iterable[Sequence[int]], causal: bool = False) -> tuple[int, float]:
    """Number of tokens of packed sequences, and number of pairs of a token and one that it attends to.

    Args:
        groups: begin, end of the prefix, end of every suffix, as in `Layout.spans`. The shared prefix counts once.
        causal: count half of the pairs of a causal block, see the module docstring.
    """
    block = 0.5 if causal else 1.0
    tokens, pairs = 0, 0.0
    for begin, prefix_end, *ends in groups:
        prefix = prefix_end - begin
        tokens, pairs = tokens + prefix, pairs + block * prefix**2
        for start, end in pairwise((prefix_end, *ends)):
            suffix = end - start
            # A suffix attends to its whole prefix, and causally to itself.
            tokens, pairs = tokens + suffix, pairs + suffix * prefix + block * suffix**2
    return tokens, pairs


def num_lora_parameters(text: dict[str, Any], rank: int) -> int:
    """Number of parameters of `lora.add_lora`, rank x (inputs + outputs) per projection, without making the model.

    Args:
        text: ``config.json`` of the language model (`text_config` of the VLM).
        rank: LoRA rank.
    """
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    queries, keys = heads * head, text["num_key_value_heads"] * head
    widths = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)  # q o, k v, gate up down
    return int(text["num_hidden_layers"]) * rank * int(widths)
