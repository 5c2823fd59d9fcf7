"""The page a run leaves behind: how good the model is, what is wrong with it, and how to repeat it, in one
file.

:func:`build` reads the records of a run folder and writes ``report.html`` beside them. Nothing is trained,
loaded or fetched for it, so a page can be rebuilt at any time, also for a run that was interrupted.
"""

from hesse.report.page import build

__all__ = ["build"]
