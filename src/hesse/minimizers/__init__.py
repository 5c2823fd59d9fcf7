"""Deterministic minimisation in SciPy's shape: a search times a descent, on tensors, arrays and other libraries'
arrays.

:func:`minimize` and :func:`least_squares` solve, :func:`argmin` makes the solution differentiable. The parts are
public, so that a method can be put together that has no name: ``Method("mine", Gradient(), Fixed(0.1))``.
"""

from hesse.minimizers.descents.newton import Exact, Products, Truncated
from hesse.minimizers.descents.quasi_newton import BFGS, LBFGS, Gradient
from hesse.minimizers.implicit import argmin
from hesse.minimizers.least_squares import LeastSquaresResult, least_squares
from hesse.minimizers.method import Method
from hesse.minimizers.minimize import minimize
from hesse.minimizers.result import MinimizeError, Result, Row, Status, Trace
from hesse.minimizers.searches.line_search import Armijo, Fixed, Wolfe
from hesse.minimizers.searches.regions import Cubic, TrustRegion
from hesse.minimizers.state import State

__all__ = [
    "BFGS",
    "LBFGS",
    "Armijo",
    "Cubic",
    "Exact",
    "Fixed",
    "Gradient",
    "LeastSquaresResult",
    "Method",
    "MinimizeError",
    "Products",
    "Result",
    "Row",
    "State",
    "Status",
    "Trace",
    "Truncated",
    "TrustRegion",
    "Wolfe",
    "argmin",
    "least_squares",
    "minimize",
]
