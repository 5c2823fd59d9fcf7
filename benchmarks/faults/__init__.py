"""``python -m benchmarks faults``: what finds planted faults and sick trainings, and what cries wolf.

Two corpora are asked: the development corpus, on which hesse's checks were written (``tests/gradient_faults``,
``tests/health_runs``), and the blind one, by someone who had not seen them (``tests/blind``).
"""

import sys
from pathlib import Path

# The corpora are the tests' own: one place puts them in reach, last, so that no name of theirs hides another.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
