"""Are the derivatives right? Compare them with differences of the function, and say where they are wrong."""

from hesse.check.gradient import GradientReport, gradients

__all__ = ["GradientReport", "gradients"]
