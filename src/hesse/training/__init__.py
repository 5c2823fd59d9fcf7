"""The main job: from a table to a trained model, its records and its page.

``train`` reads, checks, trains and judges; a ``Run`` is the folder it leaves, which predicts, reports and resumes.
"""

from hesse.training.job import train
from hesse.training.run import Run

__all__ = ["Run", "train"]
