"""``python -m benchmarks [NAME ...]``: run benchmarks and print their tables in Markdown."""

from __future__ import annotations

import argparse
import platform

import torch

from benchmarks import curvature, fusion, startup, step_cost

BENCHMARKS = {"startup": startup.main, "step_cost": step_cost.main, "curvature": curvature.main, "fusion": fusion.main}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help=", ".join(BENCHMARKS) + "; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
