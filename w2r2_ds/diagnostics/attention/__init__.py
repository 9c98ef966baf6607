"""Attention anchors: where the digits of an answer attend."""
