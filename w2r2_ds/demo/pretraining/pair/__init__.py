"""Pretraining of the demo's pair: a tiny Qwen2.5-VL and the geometry merger of the exact point-map encoder."""
