"""The methods by name.

A method is a search times a descent; under the names that SciPy has for them, each is one line.
"""

from __future__ import annotations

from hesse.minimizers.descents.newton import Bent, Exact, Mended, Products, Truncated
from hesse.minimizers.descents.quasi_newton import BFGS, LBFGS, Gradient
from hesse.minimizers.method import Method
from hesse.minimizers.searches.line_search import Armijo, Wolfe
from hesse.minimizers.searches.regions import Cubic, TrustRegion

__all__ = ["GRADIENT", "METHODS"]

METHODS = {
    "gd": Method("gd", Gradient(), Armijo()),
    "bfgs": Method("bfgs", BFGS(), Wolfe()),
    "l-bfgs-b": Method("l-bfgs-b", LBFGS(), Wolfe()),
    "newton": Method("newton", Exact(), Armijo()),
    "newton-cg": Method("newton-cg", Truncated(), Armijo()),
    "dogleg": Method("dogleg", Bent(), TrustRegion()),
    "trust-exact": Method("trust-exact", Mended(), TrustRegion()),
    "trust-ncg": Method("trust-ncg", Truncated(), TrustRegion()),
    "trust-krylov": Method("trust-krylov", Products(), TrustRegion()),
    "arc": Method("arc", Mended(), Cubic()),
    "arc-krylov": Method("arc-krylov", Products(), Cubic()),
}

# Those that need no second derivative.
GRADIENT = ("gd", "bfgs", "l-bfgs-b")
