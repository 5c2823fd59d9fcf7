"""Optimisers for training that set their own step: each is one file here.

SGD, Adagrad, Adam, AdamW and LBFGS are torch's own and run on the same :func:`hesse.closure`.
"""

from hesse.optim.kfac import KFAC

__all__ = ["KFAC"]
