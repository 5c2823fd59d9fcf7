"""Planted optimisers: one that keeps torch's contract, and many that break one promise of it."""
