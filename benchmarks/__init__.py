"""What hesse claims about speed and accuracy, each with the command that measures it: ``python -m benchmarks``."""
