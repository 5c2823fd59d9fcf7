"""Planted faults with their repair, sick trainings with their cure, and healthy ones of both: a blind corpus.

Written by someone who had not seen the code under test, and nothing was tuned on it: what is not recognised here
stands in a table of misses (``tests/check/test_blind.py``, ``tests/health/test_blind.py``), it is not made to fit.
"""
