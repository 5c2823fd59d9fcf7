"""``python -m benchmarks [NAME ...]``: run benchmarks and print their tables in Markdown.

``python -m benchmarks training`` has options of its own and takes long: it runs only by name.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks import curvature, fusion, startup, step_cost
from benchmarks.training import run as training

BENCHMARKS = {"startup": startup.main, "step_cost": step_cost.main, "curvature": curvature.main, "fusion": fusion.main}


def main() -> None:
    if sys.argv[1:2] == ["training"]:
        training.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help=", ".join(BENCHMARKS) + "; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
