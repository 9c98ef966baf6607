"""Benchmarks of speed and memory; ``w2r2 bench NAME`` runs one (commands/bench.py)."""
