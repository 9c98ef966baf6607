"""Scoring protocols; importing the package registers the built-in ones."""

from w2r2_ds.evaluation.protocols import detection, scan2cap, scanqa, scanrefer, scanrefer_vgllm

__all__ = ["detection", "scan2cap", "scanqa", "scanrefer", "scanrefer_vgllm"]
