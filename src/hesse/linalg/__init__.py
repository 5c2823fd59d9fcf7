"""Linear algebra on curvature blocks, finite-checked and in a precision that holds."""

from hesse.linalg.inverse import damped_inverse, solve_psd

__all__ = ["damped_inverse", "solve_psd"]
