"""Are the derivatives right? Compare them with differences of the function, and say where they are wrong."""

from hesse.check.gradient import gradients
from hesse.check.report import Report

__all__ = ["Report", "gradients"]
