"""The pages a run leaves behind: how good the model is, what is wrong with it, how to repeat it, in one file each.

:func:`build` reads the records of a run folder and writes ``report.html`` beside them. Nothing is trained,
loaded or fetched for it, so a page can be rebuilt at any time, also for a run that was interrupted.
:func:`build_spectrum` does the same with ``spectrum.json`` and ``spectrum.html``: how the loss of the trained model
curves, and :func:`build_tune` with ``tune.json`` and ``tune.html``: what a search for settings found.
"""

from hesse.report.page import build
from hesse.report.spectrum import build_spectrum
from hesse.report.tune import build_tune

__all__ = ["build", "build_spectrum", "build_tune"]
