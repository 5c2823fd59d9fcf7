"""Optimisers for training against tuned peers: small tasks, steps and seconds to a target fixed before the race."""
