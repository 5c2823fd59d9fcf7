"""Which method: by name, or by what is known of the function."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from hesse.minimizers.descents.bounded import ProjectedCG, ProjectedLBFGS
from hesse.minimizers.descents.proximal import Proximal
from hesse.minimizers.functions.autodiff import Autodiff
from hesse.minimizers.functions.function import Function
from hesse.minimizers.functions.numeric import Numeric
from hesse.minimizers.method import Method
from hesse.minimizers.methods import GRADIENT, METHODS
from hesse.minimizers.searches.regions import TrustRegion

__all__ = ["choose"]

# Up to SMALL variables a dense Hessian costs next to nothing; up to DENSE it costs less than the products that a hard
# problem takes; above, a Hessian is whole only if it is sparse.
SMALL, DENSE = 100, 500

COMPOSITE = {
    "prox-newton": Method("prox-newton", Proximal(), TrustRegion()),
    "l-bfgs-b": Method("l-bfgs-b", ProjectedLBFGS(), TrustRegion()),
}
_REFUSED = "method {!r} takes no {}. 'prox-newton' and 'l-bfgs-b' do, and 'auto' chooses."
LARGE = Method("prox-newton", ProjectedCG(), TrustRegion())


def choose(method: str | Method | None, function: Function, x: Tensor) -> tuple[Method, str]:
    """The method, and what is to be said about the choice.

    Raises:
        ValueError: an unknown name, or a method that cannot do what is asked.
    """
    if isinstance(method, Method):
        if function.composite and not isinstance(method.descent, Proximal | ProjectedCG | ProjectedLBFGS):
            raise ValueError(_REFUSED.format(method.name, "l1" if function.l1 else "bounds"))
        return method, ""
    if method is not None and not isinstance(method, str):
        raise TypeError(f"method must be a name or a Method; got {type(method).__name__}.")
    if method is None or method == "auto":
        return _auto(function, x)
    name = method.lower().replace("_", "-")
    name = "l-bfgs-b" if name == "l-bfgs" else name
    if name not in METHODS and name not in COMPOSITE:
        known = ", ".join(map(repr, ["auto", *sorted({*METHODS, *COMPOSITE}), "lm"]))
        raise ValueError(f"unknown method {method!r}. Known are {known}.")
    if function.composite or name == "prox-newton":
        if name not in COMPOSITE:
            raise ValueError(_REFUSED.format(name, "l1" if function.l1 else "bounds"))
        found = COMPOSITE[name]
        if name == "prox-newton" and not _whole(function, x):
            found = LARGE
    else:
        found = METHODS[name]
    if name in GRADIENT and isinstance(function.source, Autodiff):
        function.source.second = False
    return found, _derivatives(function, name)


def _auto(function: Function, x: Tensor) -> tuple[Method, str]:
    n = x.numel()
    size = f"auto: {n} variable{'s' if n != 1 else ''}"
    source = function.source
    if isinstance(source, Numeric) and function.hess is None and function.hessp is None:
        # A Hessian by differences costs n gradients, each step anew.
        name = "bfgs" if n <= 2 * DENSE and not function.composite else "l-bfgs-b"
        found = COMPOSITE[name] if function.composite else METHODS[name]
        return found, f"; {size}, {source.name if function.jac is None else 'jac given, no hess'}"
    whole = _whole(function, x)
    if function.composite:
        return (COMPOSITE["prox-newton"] if whole else LARGE), f"; {size}, {whole or 'Hessian products'}"
    return METHODS["trust-exact" if whole else "trust-krylov"], f"; {size}, {whole or 'Hessian products'}"


def _whole(function: Function, x: Tensor) -> str:
    """How a whole Hessian is to be had, empty where products are better."""
    n, source = x.numel(), function.source
    if function.hess is not None:
        return "hess given"
    if function.hessp is not None and n > SMALL:
        return ""
    if isinstance(source, Autodiff) and n > SMALL and not function.composite and find_spec("scipy") is not None:
        source.sparse = source.trace(x)
        if source.sparse is not None:
            return f"sparse Hessian from {source.sparse.products} products"
    return f"dense Hessian by {source.name}" if n <= DENSE else ""


def _derivatives(function: Function, name: str) -> str:
    """What differences were needed, which a user should know."""
    if not isinstance(function.source, Numeric):
        return ""
    missing = []
    if function.jac is None:
        missing.append("gradient by differences of values")
    if name not in GRADIENT and function.hess is None and function.hessp is None:
        missing.append("Hessian by " + function.source.name)
    return "".join(f"; {part}" for part in missing)
