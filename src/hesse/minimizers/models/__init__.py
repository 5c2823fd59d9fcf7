"""Quadratic models of a function at a point, and their least value within a region."""
