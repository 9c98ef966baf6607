"""Tasks; importing this package registers the built-in ones."""

from w2r2_ds.data.tasks import detection, scan2cap, scanqa, scanrefer

__all__ = ["detection", "scan2cap", "scanqa", "scanrefer"]
