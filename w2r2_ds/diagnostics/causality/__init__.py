"""Geometric causality: how far answers follow a change of the geometry while the pixels stay."""
