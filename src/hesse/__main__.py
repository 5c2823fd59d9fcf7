"""``python -m hesse``: the command, for programs that start modules, such as ``torchrun``."""

from hesse.cli import main

if __name__ == "__main__":
    main()
