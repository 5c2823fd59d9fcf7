"""How the loss of a trained run curves: the outermost eigenvalues, the traces, how the rest is spread, and whose it is.

Two matrices are looked at. The Gauss-Newton matrix is what the curvature of the loss at the outputs makes of the
parameters. It has no negative eigenvalue, so its parts can be compared: the trace of the whole is the sum of those of
its blocks, one for each modality's encoder and one for what fuses them. The Hessian adds the curvature of the network
itself; what is negative in it says that the run has not stopped at a minimum.

Nothing is trained. The model is the one that predicts: averaged weights, in eval mode. No number depends on the clock,
so a seed gives the same file again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

import hesse
from hesse.curvature import ggn, hessian
from hesse.curvature.blocks import TRIAL
from hesse.finding import InputError
from hesse.linalg import Density, Eigenpairs, Estimate, LinearOperator
from hesse.multimodal import Dataset, FusedModel, Schema, Table, encode, make_schema, read_table
from hesse.multimodal.split import Parts
from hesse.multimodal.stream import Source, divide, open_source
from hesse.multimodal.stream.divide import TEST, TRAIN, VALID
from hesse.training.build import plain
from hesse.training.call import DEFAULTS, for_schema, modality_name
from hesse.training.evaluate import known_targets, outputs
from hesse.training.losses import loss_of
from hesse.training.screen import Screen

if TYPE_CHECKING:
    from hesse.training.run import Run

__all__ = ["measure"]

PARTS = ("train", "valid", "test")
LOSS_NAMES = {
    "classification": "cross-entropy",
    "multilabel": "binary cross-entropy",
    "regression": "mean squared error of the standardised target",
}
TRACE_RTOL = 0.05
STEPS, VECTORS = 50, 2  # of the density: fewer steps leave waves in it, vectors matter less on its logarithmic scale
# At the lower end eigenvalues lie close together. With room for all products that this takes, a search never starts
# anew, and needs half as many.
LOWEST_RTOL, LOWEST_BASIS = 0.01, 120

Found = TypeVar("Found", Eigenpairs, Estimate, Density)


def measure(
    run: Run,
    table: Any,
    data_root: str | os.PathLike[str] | None,
    split: str | None,
    rows: int,
    batch_size: int,
    k: int,
    seed: int,
    screen: Screen,
) -> dict[str, Any]:
    """The record ``spectrum.json``; the arguments are those of :meth:`hesse.Run.spectrum`.

    Raises:
        InputError: an argument, the table or the run cannot be used.
    """
    _refuse(split, rows, batch_size, k, seed)
    rows, batch_size, k, seed = int(rows), int(batch_size), int(k), int(seed)  # NumPy's are no JSON
    model = run.model()
    data, part, available = _rows(run, table, data_root, split, rows, seed, screen)
    positions = torch.arange(len(data))
    loss = float(loss_of(run.schema)(outputs(model, data, positions), known_targets(data, positions)))
    if not np.isfinite(loss):
        raise InputError(
            "no curvature",
            str(run.folder / "model.safetensors"),
            f"The loss on these rows is {loss}, so it has no curvature.",
            "Look for weights that are not finite, or put the file back that hesse wrote.",
        )
    batches = []
    for some in positions.split(batch_size):
        inputs, targets = data.batch(some)
        batches.append((model.prepare(inputs), targets))
    asked = {"split": part, "rows": rows, "batch-size": batch_size, "k": k, "seed": seed}
    asked |= {"table": table, "data-root": data_root}
    return {
        "hesse": hesse.__version__,
        "torch": torch.__version__,
        "command": _command(run.folder, asked),
        "table": run.config.get("table", ""),
        "target": ", ".join(target.name for target in run.schema.targets),
        "optimizer": run.config["optimizer"],
        "lr": run.config.get("lr"),
        "loss": " + ".join(LOSS_NAMES[target.task] for target in run.schema.targets),
        "loss_value": loss,
        "part": part,
        "rows": len(data),
        "available": available,
        "batch_size": batch_size,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        # The outputs of a row can bend the loss in so many directions: softmax takes one of the classes away.
        "rank": len(data) * max(1, run.schema.outputs - 1),
        **_curvature(run.schema, model, batches, k, seed, screen),
    }


def _command(folder: Path, options: dict[str, Any]) -> str:
    """What to type to have the same again; a table that is a data frame cannot be typed."""
    words = ["hesse", "spectrum", str(folder)]
    for name, value in options.items():
        if isinstance(value, int | str | os.PathLike):
            words += [f"--{name}" if len(name) > 1 else f"-{name}", str(value)]
    return shlex.join(words)


# -- rows ---------------------------------------------------------------------------------------------------------


def _refuse(split: str | None, rows: int, batch_size: int, k: int, seed: int) -> None:
    if split is not None and split not in PARTS:
        message = f"There is no split '{split}'."
        raise InputError("unknown split", "split", message, f"Choose from {', '.join(PARTS)}.", value=split)
    for name, value, least in (("rows", rows, 1), ("batch_size", batch_size, 1), ("k", k, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or value < least:
            message = f"It must be a whole number, {least} or more; got {value}."
            raise InputError("bad argument", name, message, "Change it.", value=value)


def _rows(
    run: Run,
    table: Any,
    data_root: str | os.PathLike[str] | None,
    split: str | None,
    rows: int,
    seed: int,
    screen: Screen,
) -> tuple[Dataset, str, int]:
    """Rows of one part of the run's own table, the name of the part, and how many rows it has."""
    settings = DEFAULTS | run.config["arguments"]
    if table is None:
        table = _recorded_table(run)
        data_root = settings["data_root"] if data_root is None else data_root
    streamed = run.config.get("streamed", False)
    source: Any = (open_source if streamed else read_table)(table, delimiter=settings["delimiter"])
    root = Path(data_root) if data_root else source.folder or Path.cwd()
    names = [target.name for target in run.schema.targets]
    find = _parts_of_stream if streamed else _parts_of_table
    parts, changed = find(run, source, names, settings, root)
    if changed:
        raise InputError(
            "another table",
            source.name,
            f"This is not what the run was trained on: {changed}. Which of its rows were held out cannot be told.",
            "Give the table of the run as it was (--table).",
        )
    part = split or ("test" if len(parts["test"]) else "valid")
    if not len(parts[part]):
        raise InputError(
            "no rows left", source.name, f"No row is in the {part} part.", "Choose another --split.", value=part
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = parts[part][torch.randperm(len(parts[part]), generator=generator)[:rows].sort().values.numpy()]
    with screen.decoding("reading files") as progress:
        data = encode(
            run.schema,
            source.gather(chosen) if streamed else _with_targets_of(source, names, chosen),
            root=root,
            skip_bad_rows=settings["skip_bad_rows"],
            progress=progress,
        )
    return data, part, len(parts[part])


def _parts_of_table(
    run: Run, source: Table, names: list[str], settings: Mapping[str, Any], root: Path
) -> tuple[Parts, str]:
    """Which rows were for what, and in what the table is not the run's."""
    schema, parts = make_schema(source, names, split_column=settings["split_column"], root=root, **for_schema(settings))
    return parts, run.unlike(schema, len(source))


def _parts_of_stream(
    run: Run, source: Source, names: list[str], settings: Mapping[str, Any], _: Path
) -> tuple[Parts, str]:
    """The same for a table that was streamed, of which the number of rows is compared and nothing else."""
    if run.config["rows"] != len(source):
        return {}, f"it had {run.config['rows']} rows and has {len(source)}"
    division = divide(source, names, settings["split_column"], settings["seed"])
    return {name: division.rows(code) for name, code in (("train", TRAIN), ("valid", VALID), ("test", TEST))}, ""


def _recorded_table(run: Run) -> str:
    """The path of the table in the command that made the run."""
    if run.config.get("python_call", "").startswith("hesse.train(table,"):
        raise InputError(
            "no table",
            str(run.folder),
            "The run was trained on a data frame, which a run does not keep.",
            "Give it again: run.spectrum(table=...), or --table with a file of the same rows.",
        )
    path = shlex.split(run.config["command"])[2]
    if not Path(path).exists():
        raise InputError(
            "missing table",
            path,
            "The table that the run was trained on is not there, seen from this folder.",
            "Say where it is with --table.",
        )
    return path


def _with_targets_of(source: Table, targets: list[str], rows: NDArray[np.int64]) -> Table:
    """The table with the targets of these rows alone: all others are left out, and messages still number rows right."""
    wanted = np.zeros(len(source), bool)
    wanted[rows] = True
    data = source.data
    for name in targets:
        values = source.column(name)
        values = pc.if_else(pa.array(wanted), values, pa.scalar(None, values.type))
        data = data.set_column(source.names.index(name), name, values)
    return replace(source, data=data)


# -- numbers ------------------------------------------------------------------------------------------------------


class _Meter:
    """Runs one computation after the other, moves the bar, and says what each took."""

    def __init__(self, screen: Screen, progress: Callable[[int, int], None], total: int) -> None:
        self._screen, self._progress, self._total = screen, progress, total
        self._done = 0
        progress(0, total)

    def __call__(self, what: str, compute: Callable[[], Found]) -> Found:
        began = perf_counter()
        found = compute()
        self._done += 1
        self._progress(self._done, self._total)
        self._screen.say(f"{what}: {found.products} products, {perf_counter() - began:.1f} s")
        return found


def _steady(A: LinearOperator) -> LinearOperator:
    """``A``, never asked for so many columns at once that it would try by the clock which way is faster.

    The ways differ by rounding, and the same seed is to give the same numbers.
    """

    def apply(columns: torch.Tensor) -> torch.Tensor:
        return torch.cat([A @ few for few in columns.split(TRIAL - 1, dim=1)], dim=1)

    return LinearOperator(apply, A.layout or A.shape[0], dtype=A.dtype, symmetric=True, psd=A.psd)


def _curvature(
    schema: Schema, model: FusedModel, batches: list[tuple[Any, Any]], k: int, seed: int, screen: Screen
) -> dict[str, Any]:
    """Gauss-Newton matrix, Hessian and blocks of the loss on all batches together."""
    loss_fn = loss_of(schema)
    batch = batches[0] if len(batches) == 1 else batches
    # Forward mode takes three quarters of the time of double backward through convolutions; modes are named so that no
    # number depends on the clock.
    blocks = _blocks(schema, model)
    with screen.decoding("curvature") as progress:
        meter = _Meter(screen, progress, 7 + len(blocks))
        G = ggn(model, loss_fn, batch, mode="forward")
        gauss_newton = _whole(meter, "Gauss-Newton", _steady(G), k, seed)
        diagonal = meter("Gauss-Newton, diagonal", lambda: G.diagonal(method="exact"))
        gauss_newton["trace"] = _exact(diagonal.value)
        for block in blocks:
            _measure_block(meter, G, diagonal.value, block, seed)
        _compare(gauss_newton, blocks)
        H = _steady(hessian(model, loss_fn, batch, mode="double-backward"))
        of_hessian = _whole(meter, "Hessian", H, k, seed)
        search: dict[str, Any] = {"which": "SA", "rtol": LOWEST_RTOL, "basis": LOWEST_BASIS, "seed": seed}
        of_hessian["lowest"] = _eigenvalues(meter("Hessian, most negative", lambda: H.eigsh(1, **search)))[0]
        of_hessian["trace"] = _estimate(meter("Hessian, trace", lambda: H.trace(rtol=TRACE_RTOL, seed=seed)))
    return {"gauss_newton": gauss_newton, "hessian": of_hessian, "blocks": blocks}


def _whole(meter: _Meter, what: str, A: LinearOperator, k: int, seed: int) -> dict[str, Any]:
    pairs = meter(f"{what}, largest", lambda: A.eigsh(min(k, A.shape[0]), seed=seed))
    density = meter(f"{what}, density", lambda: A.spectral_density(steps=STEPS, vectors=VECTORS, seed=seed))
    return {
        "eigenvalues": _eigenvalues(pairs),
        "density": {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()},
    }


def _blocks(schema: Schema, model: FusedModel) -> list[dict[str, Any]]:
    """One for each modality, and one for what is not an encoder; with the names of its parameters as a pattern."""
    inside = "encoders" if plain(model) is model else "model.encoders"
    encoders = [
        {
            "key": key,
            "name": modality_name(schema, key),
            "kind": settings["kind"],
            "pattern": f"{inside}.{key}.*",
        }
        for key, settings in schema.model_settings().items()
    ]
    rest = [name for name, _ in model.named_parameters() if not name.startswith(f"{inside}.")]
    return [*encoders, {"key": "head", "name": "fusion and head", "kind": "head", "pattern": rest}]


def _measure_block(meter: _Meter, G: LinearOperator, diagonal: torch.Tensor, block: dict[str, Any], seed: int) -> None:
    """Add to a block what is to be known of it."""
    B = G.block(block.pop("pattern"))
    assert G.layout is not None and B.layout is not None
    largest = meter(f"{block['name']}, largest", lambda: _steady(B).eigsh(1, seed=seed))
    part = torch.cat([diagonal[G.layout.slices[name]] for name in B.layout.shapes])
    block |= {"parameters": B.shape[0], "trace": _exact(part), "largest": _eigenvalues(largest)[0]}


def _compare(gauss_newton: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    """Add what follows from traces and largest eigenvalues."""
    total = gauss_newton["trace"]["value"]
    top = [pair["value"] for pair in gauss_newton["eigenvalues"]]
    gauss_newton["effective_dimension"] = _ratio(total, top[0])
    gauss_newton["share_of_largest"] = _ratio(sum(top), total)
    for block in blocks:
        block["share"] = _ratio(block["trace"]["value"], total)
        block["effective_dimension"] = _ratio(block["trace"]["value"], block["largest"]["value"])


def _ratio(value: float, of: float) -> float | None:
    return value / of if of > 0 else None


def _eigenvalues(pairs: Eigenpairs) -> list[dict[str, Any]]:
    return [
        {"value": value, "error": bound, "converged": pairs.converged}
        for value, bound in zip(pairs.values.tolist(), pairs.bounds.tolist(), strict=True)
    ]


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": float(estimate.value), "error": float(estimate.error), "converged": estimate.converged}


def _exact(diagonal: torch.Tensor) -> dict[str, Any]:
    """The trace, from the elements on the diagonal."""
    return {"value": float(diagonal.sum()), "error": 0.0, "converged": True}
