"""What hesse claims about speed and accuracy, each with the command that measures it: ``python -m benchmarks``."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the hesse command does
