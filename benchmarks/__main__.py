"""``python -m benchmarks [NAME ...]``: run benchmarks and print their tables in Markdown.

``python -m benchmarks training``, ``minimize``, ``faults`` and ``multimodal`` have options of their own and take long,
``watch`` and ``streaming`` take long: they run only by name.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks import curvature, startup, step_cost, streaming, watch
from benchmarks.faults import run as faults
from benchmarks.minimize import run as minimize
from benchmarks.multimodal import run as multimodal
from benchmarks.training import run as training

BENCHMARKS = {"startup": startup.main, "step_cost": step_cost.main, "curvature": curvature.main}
LONG = {"watch": watch.main, "streaming": streaming.main}
OWN = {"training": training.main, "minimize": minimize.main, "faults": faults.main, "multimodal": multimodal.main}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in OWN:
        return OWN[sys.argv[1]](sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    told = ", ".join(BENCHMARKS) + "; these by default; " + ", ".join([*LONG, *OWN])
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS, *LONG], help=told)
    names = parser.parse_args().names or list(BENCHMARKS)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    for name in names:
        (BENCHMARKS | LONG)[name]()
    return None


if __name__ == "__main__":
    main()
