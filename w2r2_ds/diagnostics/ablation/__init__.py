"""Ablations: train and evaluate a grid of options with several seeds, and compare the arms with a baseline arm."""
