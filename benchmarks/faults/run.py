"""``python -m benchmarks faults [gradients] [trainings]``: the tables of both tools; both by default."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Sequence

import torch

from benchmarks.faults import gradients, trainings

__all__ = ["main"]

PARTS = {"gradients": gradients.main, "trainings": trainings.main}


def main(arguments: Sequence[str]) -> None:
    """Print the tables in Markdown, measured on one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=", ".join(PARTS) + "; both by default")
    parts = parser.parse_args(arguments).parts or list(PARTS)
    torch.set_num_threads(1)
    logging.getLogger("hesse.health").setLevel(logging.CRITICAL)  # findings are counted, not shown one by one
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, processor time\n")
    for part in parts:
        PARTS[part]()
