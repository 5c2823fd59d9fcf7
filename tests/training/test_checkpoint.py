"""A checkpoint comes from a disk that others may write to: nothing in it is run, and damage is told."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import hesse
from hesse import InputError
from training_tables import numbers


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(path: Path) -> bytes:
    return pickle.dumps(Evil(path))


def pickled_in_torchs_format(path: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"model": Evil(path)}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hesse.Run:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    return hesse.train(pa.table(numbers()), "species", out=folder, epochs=1, optimizer="adamw", verbose=False)


def resume_with(run: hesse.Run, content: bytes) -> InputError:
    """The error of resuming ``run`` with such a checkpoint; what was there is put back."""
    path = run.folder / "checkpoint.pt"
    before, model = path.read_bytes(), (run.folder / "model.safetensors").read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(InputError) as error:
            hesse.train(pa.table(numbers()), "species", out=run.folder, resume=True, verbose=False)
    finally:
        path.write_bytes(before)
    assert (run.folder / "model.safetensors").read_bytes() == model
    return error.value


@pytest.mark.parametrize("make", [pickled, pickled_in_torchs_format])
def test_a_pickle_is_refused_and_not_run(run: hesse.Run, tmp_path: Path, make: Any) -> None:
    trap = make(tmp_path / "pwned")
    assert resume_with(run, trap).finding.kind in ("unsafe checkpoint", "damaged checkpoint")
    assert not (tmp_path / "pwned").exists()
    if make is pickled_in_torchs_format:
        torch.load(io.BytesIO(trap), weights_only=False)
    else:
        pickle.loads(trap)  # noqa: S301
    assert (tmp_path / "pwned").exists()  # it was live


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(run: hesse.Run, keep: float) -> None:
    content = (run.folder / "checkpoint.pt").read_bytes()
    error = resume_with(run, content[: int(keep * len(content)) if keep < 1 else int(keep)])
    assert error.finding.kind in ("damaged checkpoint", "unsafe checkpoint")
    assert "--overwrite" in str(error)


@pytest.mark.parametrize("content", [b"hello, world\n", b"\x00" * 1000, bytes(range(256)) * 10])
def test_rubbish_is_refused(run: hesse.Run, content: bytes) -> None:
    assert resume_with(run, content).finding.kind in ("damaged checkpoint", "unsafe checkpoint")


@pytest.mark.parametrize(
    "value", [{}, [1, 2], {"model": {}}, {"model": 5}, {"model": {"weight": torch.zeros(2)}}, torch.zeros(3)]
)
def test_another_programs_file_is_refused(run: hesse.Run, value: Any) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    assert resume_with(run, file.getvalue()).finding.kind == "foreign checkpoint"


@pytest.mark.parametrize("name", ["model", "average", "optimizer", "monitor", "random", "earlier", "best"])
@pytest.mark.parametrize("value", [None, {}, [7]])
def test_a_checkpoint_with_a_wrong_part_is_refused(run: hesse.Run, name: str, value: Any) -> None:
    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    file = io.BytesIO()
    torch.save({**saved, name: value}, file)
    if (name, value) not in (("earlier", {}), ("best", {})):  # these may be empty
        assert resume_with(run, file.getvalue()).finding.kind == "foreign checkpoint"


def test_safetensors_are_no_checkpoint(run: hesse.Run, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    content = (tmp_path / "other.safetensors").read_bytes()
    assert resume_with(run, content).finding.kind in ("damaged checkpoint", "unsafe checkpoint")


def test_no_file_of_a_run_is_a_pickle(run: hesse.Run) -> None:
    torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert {path.suffix for path in run.folder.iterdir()} == {".pt", ".safetensors", ".json", ".jsonl", ".html", ".md"}
