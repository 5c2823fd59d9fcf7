"""Whether the loop waits for its rows: 100 000 pictures in as many files, streamed and decoded while it trains.

The table and the pictures are written to a temporary folder, and deleted. ``waited`` is the share of the training time
in which the loop stood still because no batch was there. With no worker the loop decodes itself and waits for all of
it: that is what workers save. Memory is that of all processes of the run, shared pages counted once.

On a machine with other work ``waited`` says more about that work. So the processor time of decoding a batch is measured
beside that of a step on it, each on one thread: a worker with a processor of its own keeps ahead while it needs less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from hesse.files import read_json, read_lines
from hesse.multimodal import FusedModel, make_schema, read_table
from hesse.multimodal.dataset import read_rows
from hesse.objective import closure
from hesse.training.optimizers import make_optimizer

ROWS = 100_000
SIDE = 28
SECONDS = 60.0  # of training
BATCH = 512
OPTIMIZERS = ("kfac", "adamw")


def main() -> None:
    """Print a row for each optimiser and number of workers."""
    print(f"### Streaming {ROWS} rows with a picture each ({SIDE} x {SIDE} PNG files)\n")
    with tempfile.TemporaryDirectory() as folder:
        began = perf_counter()
        table = _write(Path(folder))
        print(f"Written in {perf_counter() - began:.0f} s.\n")
        decoding, steps = _processor_times(table)
        each = ", ".join(f"by {name} {1000 * seconds:.0f} ms" for name, seconds in steps.items())
        print(f"Processor time of one thread for {BATCH} rows: decoding {1000 * decoding:.0f} ms; a step {each}.\n")
        print("| optimizer | workers | to the first step, s | rows/s | steps | waited (goal <= 0.10) | memory, MB |")
        print("|---|---|---|---|---|---|---|")
        for optimizer in OPTIMIZERS:
            for workers in (1, 0):
                print(_row(table, optimizer, workers), flush=True)
    print()


def _write(folder: Path) -> Path:
    """Ten classes of noisy pictures in a hundred folders, a number and a category."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 100, (10, SIDE, SIDE))
    lines = ["picture,size,kind,label"]
    for i in range(ROWS):
        if i % 1000 == 0:
            (folder / f"{i // 1000:02}").mkdir()
            noise = random.integers(0, 156, (1000, SIDE, SIDE))
        name = f"{i // 1000:02}/{i}.png"
        Image.fromarray((patterns[i % 10] + noise[i % 1000]).astype(np.uint8)).save(folder / name)
        lines.append(f"{name},{random.normal():.3f},{'abc'[i % 3]},class {i % 10}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _processor_times(table: Path) -> tuple[float, dict[str, float]]:
    """Seconds of processor time to decode a batch, and for each optimiser to take a step on it; medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sample = read_table(table).slice(0, 4000)
    schema, _ = make_schema(sample, "label", root=table.parent)
    decoding, steps, data = [], {}, None
    for i in range(7):
        began = process_time()
        data, _ = read_rows(schema, sample.slice(BATCH * i, BATCH), root=table.parent)
        decoding.append(process_time() - began)
    assert data is not None
    inputs, targets = data.batch(slice(None))
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        model = FusedModel(schema.model_settings(), schema.outputs)
        optimizer = make_optimizer(name, model)
        times = []
        for _ in range(12):
            began = process_time()
            optimizer.step(closure(model, F.cross_entropy, (model.prepare(inputs), targets)))
            times.append(process_time() - began)
        steps[name] = median(times[2:])
    torch.set_num_threads(threads)
    return median(decoding), steps


def _row(table: Path, optimizer: str, workers: int) -> str:
    run = table.parent / f"{optimizer}-{workers}"
    words = ["train", table, "--target", "label", "--out", run, "--optimizer", optimizer, "--seconds", SECONDS]
    began = perf_counter()
    command = [sys.executable, "-m", "hesse", *words, "--stream", "--workers", workers]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        most = [0.0]
        watcher = threading.Thread(target=_watch, args=(process, most))
        watcher.start()
        first = 0.0
        assert process.stderr is not None
        for line in process.stderr:
            if "gradient check" in line and not first:
                first = perf_counter() - began
        watcher.join()
    if process.returncode:
        raise RuntimeError(f"hesse train ended with {process.returncode}")
    last = read_lines(run / "metrics.jsonl")[-1]
    size = read_json(run / "config.json")["batch_size"]
    rate = size * last["step"] / last["seconds"]
    waited = last["waited"] / last["seconds"]
    return f"| {optimizer} | {workers} | {first:.0f} | {rate:.0f} | {last['step']} | {waited:.3f} | {most[0]:.0f} |"


def _watch(process: subprocess.Popen[str], most: list[float]) -> None:
    """The largest proportional memory of a process and its children, in megabytes."""
    while process.poll() is None:
        most[0] = max(most[0], sum(map(_memory, _family(process.pid))))
        sleep(0.5)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:  # it has just ended, or this is no Linux
        return []
    return [pid, *(child for first in children for child in _family(int(first)))]


def _memory(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} processors\n")
    main()
