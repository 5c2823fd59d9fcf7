"""Deterministic minimisers against SciPy and pytorch-minimize: problems with known answers, edge cases, costs."""
