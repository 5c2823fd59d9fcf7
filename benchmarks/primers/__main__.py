"""``python -m benchmarks.primers``: draw all pictures, and print the numbers that the pages quote."""

from __future__ import annotations

import torch

from benchmarks.primers.damping import draw_filter, draw_own_batch, draw_progress, print_judges
from benchmarks.primers.newton import (
    alpha_table,
    draw_alpha,
    draw_overshoot,
    draw_quadratic,
    quadratic_table,
    scale_table,
)
from benchmarks.primers.step import draw_found, draw_plane, draw_shares


def main() -> None:
    torch.set_num_threads(1)
    for draw in (draw_filter, draw_own_batch, print_judges, draw_progress, draw_shares, draw_plane, draw_found):
        draw()
    for draw in (draw_quadratic, draw_overshoot, draw_alpha):
        draw()
    for table in (quadratic_table, scale_table, alpha_table):
        print(table.__doc__, *table(), sep="\n")


if __name__ == "__main__":
    main()
