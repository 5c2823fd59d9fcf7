"""The main job: from a table to a trained model, its records and its page.

``train`` reads, checks, trains and judges; a ``Run`` is the folder it leaves, which predicts, reports and resumes.
"""

try:
    from hesse.training.job import train
    from hesse.training.run import Run
except ModuleNotFoundError as error:
    if (error.name or "hesse").partition(".")[0] == "hesse":
        raise
    raise ImportError(f"Training on tables needs {error.name}: pip install 'hesse[train]'", name=error.name) from error

__all__ = ["Run", "train"]
