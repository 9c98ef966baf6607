"""The benchmarks behind every claim about speed or memory; `launchers/bench.py NAME` runs one."""
