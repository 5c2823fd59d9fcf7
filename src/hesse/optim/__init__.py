"""Optimisers for training: each is one file here.

Those that take the model find their own step: :class:`KFAC`, :class:`NewtonCG`, :class:`GaussNewton`. Those that take
the parameters replace Adam after ``loss.backward()``: :class:`SOAP`, :class:`Shampoo`, and, with a
:func:`hesse.closure` every few steps, :class:`AdaHessian`, :class:`SophiaH`, :class:`SophiaG`. :class:`LineSearch`
goes around any of torch's.

SGD, Adagrad, Adam, AdamW, LBFGS and Muon are torch's own and run on the same :func:`hesse.closure`.
"""

from hesse.optim.adahessian import AdaHessian
from hesse.optim.gauss_newton import GaussNewton
from hesse.optim.kfac import KFAC
from hesse.optim.line_search import LineSearch
from hesse.optim.newton_cg import NewtonCG
from hesse.optim.shampoo import Shampoo
from hesse.optim.soap import SOAP
from hesse.optim.sophia import SophiaG, SophiaH

__all__ = ["KFAC", "SOAP", "AdaHessian", "GaussNewton", "LineSearch", "NewtonCG", "Shampoo", "SophiaG", "SophiaH"]
