"""One thread a test process: pytest-xdist fills the cores, and two pools of threads on them wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
