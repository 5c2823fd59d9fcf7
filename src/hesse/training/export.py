"""The trained model in a file that other programs run: ONNX, with everything between decoded cells and answers inside.

Before the file gets its name, ONNX Runtime computes it on random rows, and every number must be what PyTorch says.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import hesse
from hesse.files import atomic_path, read_json
from hesse.finding import InputError
from hesse.training.graph import Graph, samples
from hesse.training.run import Run

__all__ = ["export"]

TOLERANCE = 1e-5  # of probabilities, and of other numbers relative to the largest of their kind
ROWS = (1, 7)  # of the batches that are compared
LARGEST = 2**31 - 1  # bytes of one file in protocol buffers
OPSET = 20
OTHERWISE = "Train with hesse's own encoders and --fusion concat, try another onnxruntime, or use hesse predict."

DECODING = {
    "image": "The picture upright as EXIF says, its aspect kept, as large as fits into height x width (bilinear), "
    "centred on a canvas of the mean colour; the fourth channel is alpha, with the colours multiplied by it.",
    "images": "Each picture as in 'image', at most length of them, zeros behind the last; counts says how many.",
    "audio": "Mono, the loudest stretch of samples / rate seconds, resampled to rate, without offset, "
    "its peak at 32767; zeros behind the end.",
    "text": "NFKC, cut to length; 0 is padding, 1 a character that is not in the alphabet, else 2 + its place in it.",
    "features": "What the pretrained model named in the schema (source, identity) makes of the cell.",
    "columns": "Numbers standardised by mean and std, clipped to 10 deviations, NaN where missing; categories 1 + "
    "their place in values, 0 where missing or unknown. In the order of the schema. A date is d = days since "
    "1970-01-01 in UTC, standardised, then sine and cosine of 2 pi t for those its settings name: season t = d / "
    "365.2425, weekday t = floor(d) / 7, hour t = d. A latitude (phi) with its longitude (lambda) is cos phi cos "
    "lambda, cos phi sin lambda, sin phi, then both in degrees, standardised; where one of them is "
    "missing only the degrees of the other are there, and the rest is NaN.",
}


def export(run: Run, out: Path | None = None) -> Path:
    """Write a run's model as ONNX.

    Its inputs are those of :func:`~hesse.training.graph.ports`, with any number of rows; its outputs ``logits`` and
    ``probabilities`` or ``values`` (with several targets ``NAME.probabilities``). The metadata of the file say in JSON
    how cells become arrays: ``hesse.schema`` (columns with their settings, targets with their classes),
    ``hesse.inputs`` and ``hesse.outputs``.

    Args:
        run: with a trained model.
        out: the file; by default ``model.onnx`` in the run folder.

    Returns:
        The path of the file, whole and checked.

    Raises:
        InputError: there is no model, a part of it cannot be written as ONNX, or ONNX Runtime computes other numbers.
            No file is left.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(f"Exporting needs {name}: pip install 'hesse[export]'", name=name) from error
    path = run.folder / "model.onnx" if out is None else Path(out)
    if path.is_dir():
        raise InputError("not a file", str(path), "This is a folder.", "Name a file in it.")
    record = run.folder / "calibration.json"
    graph = Graph(run.schema, run.model(), read_json(record) if record.exists() else {})
    content = _written(graph, run)
    if len(content) > LARGEST:
        raise InputError(
            "model too large",
            str(path),
            f"The model takes {len(content) / 2**30:.1f} GiB, and one ONNX file holds at most 2.",
            "Train with smaller encoders.",
        )
    _compare(graph, content, str(path))
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def _written(graph: Graph, run: Run) -> bytes:
    """The model as the bytes of an ONNX file."""
    arrays = tuple(map(torch.from_numpy, samples(graph.schema, 3)))
    rows = torch.export.Dim("rows")
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                arrays,
                dynamo=True,
                opset_version=OPSET,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=(tuple({0: rows} for _ in arrays),),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(
            "not exportable",
            str(run.folder),
            f"PyTorch cannot write this model as ONNX: {reason}",
            OTHERWISE,
        ) from error
    assert program is not None
    model = program.model_proto
    for key, value in _metadata(graph).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    content: bytes = model.SerializeToString()
    return content


def _metadata(graph: Graph) -> dict[str, Any]:
    """What a reader must know to make arrays of cells and words of numbers."""
    schema = graph.schema
    return {
        "hesse.version": hesse.__version__,
        "hesse.schema": schema.to_json(),
        "hesse.inputs": {
            port.name: {
                "modality": port.modality,
                "kind": port.kind,
                "dtype": port.dtype,
                "shape": [None, *port.shape],
                "columns": [column.name for column in schema.modalities[port.modality]],
                "is": "whether the row has it" if port.dtype == "bool" else DECODING[port.kind],
            }
            for port in graph.ports
        },
        "hesse.outputs": {
            "logits": {"is": "what the network says, before calibration and units"},
            **{
                name: {"target": target.name, "task": target.task, "classes": list(target.classes)}
                for name, target in zip(graph.outputs[1:], schema.targets, strict=True)
            },
        },
    }


def _compare(graph: Graph, content: bytes, where: str) -> None:
    """Raise InputError unless ONNX Runtime gives PyTorch's numbers."""
    for rows in ROWS:
        arrays = samples(graph.schema, rows, seed=rows)
        with torch.no_grad():
            expected = [out.numpy() for out in graph(*map(torch.from_numpy, arrays))]
        got = _computed(graph, content, arrays, where)
        for name, one, other in zip(graph.outputs, expected, got, strict=True):
            error = _error(one, other, absolute=name.endswith("probabilities"))
            if not error <= TOLERANCE:
                raise InputError(
                    "other numbers",
                    where,
                    f"ONNX Runtime's {name} differ from PyTorch's by {error:.1e} on {rows} random rows; the limit is "
                    f"{TOLERANCE:.0e}. No file was left.",
                    OTHERWISE,
                    value=error,
                )


def _computed(graph: Graph, content: bytes, arrays: list[NDArray[Any]], where: str) -> list[NDArray[Any]]:
    """What ONNX Runtime makes of the arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    state = onnxruntime.capi.onnxruntime_pybind11_state  # its errors have no common base
    failures = tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        got: list[NDArray[Any]] = session.run(graph.outputs, dict(zip(graph.inputs, arrays, strict=True)))
    except failures as error:
        reason = " ".join(str(error).split())[:300]
        message = f"ONNX Runtime cannot compute the model on {len(arrays[0])} rows: {reason} No file was left."
        raise InputError("not exportable", where, message, OTHERWISE) from error
    return got


def _error(expected: NDArray[Any], got: NDArray[Any], absolute: bool) -> float:
    """The largest difference, relative to the largest value unless ``absolute``; infinite where shapes differ."""
    if expected.shape != got.shape:
        return float("inf")
    scale = 1.0 if absolute else max(1.0, float(np.abs(expected).max()))
    return float(np.abs(expected.astype(np.float64) - got).max()) / scale


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
