"""What hesse claims about speed and accuracy, each with the command that measures it: ``python -m benchmarks``."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the hesse command does: spinning threads measure each other
