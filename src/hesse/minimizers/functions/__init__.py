"""The function, as the solvers see it: on flat vectors, counted, with derivatives from wherever they can be had."""
