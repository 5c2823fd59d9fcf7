"""Curvature: the B of x - alpha B^{-1} grad f, as operators, output factors, layer statistics and quadratic models."""

from hesse.curvature.culprit import DerivativeError
from hesse.curvature.gauss_newton import fisher, ggn
from hesse.curvature.hessian import hessian
from hesse.curvature.jacobian import jvp
from hesse.curvature.kfac import kfac
from hesse.curvature.output import OutputCurvature, output_curvature
from hesse.curvature.quadratic import QuadraticModel, quadratic_model

__all__ = [
    "DerivativeError",
    "OutputCurvature",
    "QuadraticModel",
    "fisher",
    "ggn",
    "hessian",
    "jvp",
    "kfac",
    "output_curvature",
    "quadratic_model",
]
