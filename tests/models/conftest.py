"""Fixtures of the model tests."""

from tiny_vlm_fixtures import texts, tiny_dir, tokenizer, visual_inputs, vlm

__all__ = ["texts", "tiny_dir", "tokenizer", "visual_inputs", "vlm"]
