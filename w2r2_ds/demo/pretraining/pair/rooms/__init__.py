"""Data of the pretraining: rendered rooms, their world frames, views, and questions."""
