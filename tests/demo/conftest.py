"""Fixtures of the demo tests."""

from room_fixtures import many_rooms, rooms
from shift_fixtures import planted, shifted
from tiny_vlm_fixtures import texts, tiny_dir, tokenizer, visual_inputs, vlm

__all__ = ["many_rooms", "planted", "rooms", "shifted", "texts", "tiny_dir", "tokenizer", "visual_inputs", "vlm"]
