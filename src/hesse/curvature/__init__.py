"""Curvature: the B of x - alpha B^{-1} grad f, as statistics of layers, output factors and quadratic models."""

from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.curvature.quadratic import QuadraticModel, jvp, quadratic_model

__all__ = ["OutputCurvature", "QuadraticModel", "jvp", "output_curvature", "quadratic_model"]
