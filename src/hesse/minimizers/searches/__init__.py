"""Searches: how far to go."""
