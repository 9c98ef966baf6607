"""Stages of the pretraining: vision tower, dense boxes, questions."""
