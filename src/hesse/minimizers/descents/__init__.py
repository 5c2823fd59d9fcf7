"""Descents: how the curvature is known."""
