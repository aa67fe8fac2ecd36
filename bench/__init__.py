"""Benchmarks: our backends beside their peers, on the same inputs, in one run. See docs/benchmarks.md."""
