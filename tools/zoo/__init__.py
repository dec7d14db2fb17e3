"""Trains the models of `evomerge.zoo` and makes the benchmarks of `eval/`, to the same bytes on every machine."""
