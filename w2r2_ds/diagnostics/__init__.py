"""Diagnostics of trained models: reliance on 2D and geometry, causality, features, attention, ablations."""
