"""Sections of a report from the files of ``w2r2 diagnose``."""
