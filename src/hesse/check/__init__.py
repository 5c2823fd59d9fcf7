"""Are the derivatives right? Compare them with differences of the function, and say where they are wrong."""

from hesse.check.gradient import gradients
from hesse.check.optimizer import optimizer
from hesse.check.report import Report
from hesse.check.second import hessian
from hesse.check.straight_through import straight_through

__all__ = ["Report", "gradients", "hessian", "optimizer", "straight_through"]
