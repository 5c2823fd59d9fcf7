"""``python -m benchmarks [NAME ...]``: run benchmarks and print their tables in Markdown.

``python -m benchmarks training`` and ``python -m benchmarks minimize`` have options of their own and take long: they
run only by name.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks import curvature, fusion, startup, step_cost
from benchmarks.minimize import run as minimize
from benchmarks.training import run as training

BENCHMARKS = {"startup": startup.main, "step_cost": step_cost.main, "curvature": curvature.main, "fusion": fusion.main}


def main() -> None:
    for name, main_of in (("training", training.main), ("minimize", minimize.main)):
        if sys.argv[1:2] == [name]:
            return main_of(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help=", ".join(BENCHMARKS) + "; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    for name in names:
        BENCHMARKS[name]()
    return None


if __name__ == "__main__":
    main()
