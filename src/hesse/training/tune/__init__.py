"""``hesse tune``: settings found by trying, for the optimisers that need it, with K-FAC beside them, which does not.

A search draws settings (:mod:`~hesse.training.tune.space`), workers train with them
(:mod:`~hesse.training.tune.worker`, one process each), and all that came out is one record
(:mod:`~hesse.training.tune.record`). Optuna draws, prunes and remembers.
"""

from hesse.training.tune.search import tune

__all__ = ["tune"]
