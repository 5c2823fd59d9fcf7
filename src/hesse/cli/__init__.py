"""The command line: one file a command; what a command needs is imported inside it, so that help is instant.

Exit codes: 0 fine, 1 refused or failed with a sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``hesse`` command."""
    # Torch's threads (GNU OpenMP) spin 300 000 times while they wait for each other. With anything else on the cores
    # that makes a step of a small network 40 times slower (0.8 s instead of 0.02 s, measured on two cores). Spinning
    # less costs a tenth when the cores are free; not at all, twice as much.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        from hesse.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"The hesse command needs {error.name}. Install it with: pip install 'hesse[train]'")
    except KeyboardInterrupt:
        sys.exit(130)
    run()
