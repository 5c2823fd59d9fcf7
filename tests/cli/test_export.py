"""``hesse export``: the path on stdout, a line of JSON, sentences for what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import hesse
from hesse.cli import app as cli

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="hesse[export] is not installed")


def export(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_file_and_what_is_said_of_it(tmp_path: Path) -> None:
    table = pa.table({"x": [0.1 * i for i in range(40)], "kind": ["a", "b"] * 20})
    hesse.train(table, "kind", out=tmp_path / "run", epochs=1, optimizer="adamw", verbose=False)
    out = tmp_path / "模型.onnx"
    code, line, err = export(tmp_path / "run", "--format", "onnx", "--out", out, "--json")
    assert (code, err) == (0, "")
    assert json.loads(line) == {"ok": True, "out": str(out), "format": "onnx", "bytes": out.stat().st_size}
    (tmp_path / "run" / "model.safetensors").unlink()
    code, line, err = export(tmp_path / "run", "--json")
    assert code == 1 and json.loads(line)["error"]["kind"] == "no model" and err.startswith("hesse: no model at")
    assert export(tmp_path / "nowhere")[0] == 1
    assert export(tmp_path / "run", "--format", "jpeg")[0] == 2
