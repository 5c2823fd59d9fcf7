"""A finding raised is still a finding after a copy or a trip through a worker process."""

import copy
import pickle

from hesse import InputError


def test_an_input_error_survives_copies_and_processes() -> None:
    error = InputError("missing file", "pets.csv, row 3", "There is no such file.", "Check the path.", value="猫.png")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - what worker processes do
        assert twin.finding == error.finding
        assert str(twin) == str(error)
