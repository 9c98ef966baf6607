"""Pretraining of the weights that the demo starts from."""
