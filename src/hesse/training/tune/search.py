"""The search itself: draw settings, let workers train with them, stop what looks bad, remember everything.

Random search (Bergstra and Bengio, 2012) draws blindly; the tree-structured Parzen estimator (Bergstra et al., 2011)
draws where good trials lie densely and bad ones do not. One process draws and writes; workers only train.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet

from hesse.files import write_json
from hesse.finding import InputError
from hesse.multimodal import read_table
from hesse.training import call
from hesse.training.owned import locked
from hesse.training.run import LOCK
from hesse.training.screen import Screen
from hesse.training.tune.crew import Crew
from hesse.training.tune.record import record, trials_of
from hesse.training.tune.space import refuse_untunable, space

if TYPE_CHECKING:
    import optuna

__all__ = ["tune"]

SAMPLERS = ("tpe", "random")
SEARCHED = ("lr", "weight_decay", "batch_size", "seconds", "compare")  # of hesse.train's, but not options of a search
RECORDS = ("trials", "kfac", "study.db", "study.db-shm", "study.db-wal", "tune.html", "tune.json")
STARTING, WARMING = 5, 3  # trials and epochs before any is pruned: averaged weights lag behind at first


def tune(
    table: Any,
    target: str | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    trials: int = 20,
    sampler: str = "tpe",
    optimizer: str = "adamw",
    epochs: int | None = None,
    seconds_per_trial: float | None = None,
    jobs: int = 1,
    timeout: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    verbose: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Search for the settings with the lowest validation loss, and train K-FAC once beside it, without a search.

    Searched are the learning rate (for most optimisers 0.00001 to 0.1), the weight decay (0.000001 to 0.1) and the rows
    a step (16 to 512). Trials that are worse than the median of the earlier ones at the same epoch are ended.

    Args:
        table, target: as in :func:`hesse.train`.
        out: the folder of the search; by default ``runs/TABLE-TARGET-tune``. Each trial is a run in ``trials/NUMBER``,
            K-FAC's in ``kfac``; the search itself is ``tune.json``, ``tune.html`` and, for Optuna, ``study.db``.
        trials: how many.
        sampler: "tpe" or "random".
        optimizer: whose settings are searched for.
        epochs: of each trial; by default as in :func:`hesse.train`.
        seconds_per_trial: of training, instead of ``epochs``.
        jobs: how many trials at once, each in a process with its share of the processor's cores.
        timeout: seconds after which no trial begins.
        resume: go on with the search in ``out``; ``trials`` may ask for more than before.
        overwrite: replace a search that is in ``out``.
        seed: of the search and of every training. With one job it repeats the search, unless seconds decide.
        verbose: a line on stderr for each trial.
        options: of :func:`hesse.train`, for all trainings alike: ``columns``, ``split_column``, ``fusion``, ...

    Returns:
        The record ``tune.json``: ``trials``, ``best`` (its model is in the folder it names), ``kfac``, ``seconds``.

    Raises:
        InputError: the table or an argument cannot be used, and nothing has been written.
        ImportError: Optuna is not installed.
        KeyboardInterrupt: ``resume=True`` goes on.

    References:
        Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 13, 2012.
        Bergstra, Bardenet, Bengio and Kégl, Algorithms for hyper-parameter optimization, NeurIPS 2011.
        Akiba, Sano, Yanase, Ohta and Koyama, Optuna, KDD 2019.
    """
    _optuna()
    _refuse(trials, sampler, jobs, timeout, epochs, seconds_per_trial, resume, overwrite)
    refuse_untunable(optimizer)
    for name in options:
        if name not in call.DEFAULTS or name in (*SEARCHED, "out"):
            raise TypeError(f"tune() takes no argument {name!r}.")
    given = call.given(optimizer=optimizer, epochs=epochs, seconds=seconds_per_trial, seed=seed, **options)
    folder = _default_folder(table, target) if out is None else Path(out)
    _refuse_folder(folder, resume, overwrite)
    screen = Screen(quiet=not verbose)
    words = _command(table, target, given, out=out, trials=trials, sampler=sampler, jobs=jobs, timeout=timeout)
    asked: dict[str, Any] = {
        "target": target if isinstance(target, str) else ", ".join(target),
        "sampler": sampler,
        "optimizer": optimizer,
        "seed": seed,
        "budget": {"epochs": epochs, "seconds": seconds_per_trial},
        "settings": given,
    }
    with ExitStack() as stack:
        path = stack.enter_context(_on_disk(table))
        if "data_root" not in given and not isinstance(table, str | os.PathLike):
            given = given | {"data_root": str(Path.cwd())}
        known = os.fspath(path) if path is table else None
        crew = Crew({"table": os.fspath(path), "name": known, "target": target, "settings": given}, jobs)
        stack.callback(crew.end)
        found = crew.begin()
        asked |= {name: found["record"][name] for name in ("task", "rows")}
        asked |= {"schema": found["schema"], "space": space(optimizer, found["train"])}
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        if overwrite:
            _clear(folder)
        study = stack.enter_context(_study(folder, asked, resume))
        study.set_user_attr("search", {**asked, "asked": trials, "jobs": jobs, "command": words})
        write = partial(_write, study, folder)

        def ended(number: int) -> None:
            write()
            screen.say(_line(next(trial for trial in trials_of(study) if trial["number"] == number)))

        write()
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        try:
            crew.search(study, asked["space"], _sampler(sampler, seed, jobs), folder, trials, until, ended)
            kfac = _beside(study, crew, folder, seconds_per_trial)
        except KeyboardInterrupt:
            write()
            raise KeyboardInterrupt(f"The search is saved. Go on with: {words} --resume") from None
        study.set_user_attr("kfac", kfac)
        result = write()
        screen.say(_summary(result, _page(folder, result), timeout))
        return result


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ImportError("Searching needs Optuna: pip install 'hesse[tune]'", name="optuna") from error


def _refuse(
    trials: int,
    sampler: str,
    jobs: int,
    timeout: float | None,
    epochs: int | None,
    seconds: float | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Raise InputError for an argument out of range."""
    for name, value in (("trials", trials), ("jobs", jobs)):
        if not (isinstance(value, int) and value >= 1):
            message = f"It must be a whole number, 1 or more; got {value}."
            raise InputError("bad argument", name, message, "Change it.", value)
    if timeout is not None and not timeout > 0:
        raise InputError("bad argument", "timeout", f"It must be more than 0; got {timeout}.", "Change it.", timeout)
    if sampler not in SAMPLERS:
        message = f"There is no sampler {sampler!r}."
        raise InputError("no such sampler", "sampler", message, f"Choose from {', '.join(SAMPLERS)}.", sampler)
    if epochs is not None and seconds is not None:
        message = "A trial ends after so many epochs or after so many seconds, not both."
        raise InputError("two wishes", "epochs, seconds_per_trial", message, "Choose one.")
    if resume and overwrite:
        message = "A search is resumed or replaced, not both."
        raise InputError("two wishes", "resume, overwrite", message, "Choose one.")


def _refuse_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    there = (folder / "study.db").exists() and (folder / "tune.json").exists()
    if resume and not there:
        message = "The folder holds no study.db and tune.json of hesse, which every search has."
        raise InputError("no search", str(folder), message, "Begin one without --resume.")
    if there and not (resume or overwrite):
        message = "There is a search in this folder already."
        remedy = "Go on with it (--resume), replace it (--overwrite), or choose another --out."
        raise InputError("search exists", str(folder), message, remedy)
    if not there and folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        message = "The place for the search is a file, or a folder that holds other files."
        raise InputError("folder in use", str(folder), message, "Choose a new or empty folder with --out.")


def _default_folder(table: Any, target: str | Sequence[str]) -> Path:
    run = call.default_folder(table, target)
    return run.with_name(f"{run.name}-tune")


def _command(table: Any, target: str | Sequence[str], given: dict[str, Any], **search: Any) -> str:
    """The same search as a command."""
    usual = {"trials": 20, "sampler": "tpe", "jobs": 1}
    own = {name: value for name, value in search.items() if value is not None and usual.get(name) != value}
    rest = {"seconds_per_trial" if name == "seconds" else name: value for name, value in given.items()}
    words = call.repeated(table, target, rest | {name: _plain(value) for name, value in own.items()})["command"]
    return shlex.join(["hesse", "tune", *shlex.split(words)[2:]])


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _on_disk(table: Any) -> Iterator[Any]:
    """The path of the table; a data frame is written where workers can read it, for as long as the block lasts."""
    if isinstance(table, str | os.PathLike):
        yield table
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data frame.parquet"
        pyarrow.parquet.write_table(read_table(table).data, path)
        yield path


@contextmanager
def _study(folder: Path, asked: dict[str, Any], resume: bool) -> Iterator[optuna.Study]:
    """Optuna's study, new or as it was left, with trials that were lost put back into the queue."""
    optuna = _optuna()
    from sqlalchemy import URL, event

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(
        URL.create("sqlite", database=str(folder / "study.db")).render_as_string(hide_password=False)
    )
    event.listen(storage.engine, "connect", _log_ahead)
    storage.engine.dispose()
    try:
        study = optuna.create_study(
            storage=storage,
            study_name="hesse",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTING, n_warmup_steps=WARMING),
            direction="minimize",
            load_if_exists=resume,
        )
        before = study.user_attrs.get("search")
        for name, value in asked.items() if before else ():
            if before[name] != value:
                raise InputError(
                    "another search",
                    name,
                    f"The search in {folder} has {name} {before[name]!r}, which cannot become {value!r} on the way.",
                    "Resume with the table and settings it began with, or begin anew with another --out.",
                )
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params, user_attrs={k: trial.user_attrs[k] for k in trial.user_attrs})
        yield study
    except optuna.exceptions.StorageInternalError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        message = f"What was found cannot be written: {reason}."
        raise InputError("unsaved search", str(folder / "study.db"), message, "Make room, then --resume.") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()
        optuna.logging.set_verbosity(level)


def _log_ahead(connection: Any, _: Any) -> None:
    """SQLite's faster way to survive a crash: a trial is some twenty transactions, each of which waits for the disk."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _sampler(name: str, seed: int, jobs: int) -> Callable[[int], optuna.samplers.BaseSampler]:
    """For the trial of each number a sampler with a seed of its own."""
    samplers = _optuna().samplers

    def sampler(number: int) -> optuna.samplers.BaseSampler:
        own = (seed * 1_000_003 + number) % 2**32
        if name == "random":
            return samplers.RandomSampler(seed=own)
        return samplers.TPESampler(seed=own, constant_liar=jobs > 1)

    return sampler


def _beside(study: optuna.Study, crew: Crew, folder: Path, seconds: float | None) -> dict[str, Any] | None:
    """K-FAC as it is, for the time that a trial took; None if no trial has ended."""
    times = [trial["seconds"] for trial in trials_of(study) if trial["state"] == "complete"]
    if not times and seconds is None:
        return None
    took = seconds or statistics.fmean(times)
    before: dict[str, Any] | None = study.user_attrs.get("kfac")
    if before is not None:
        return before
    shutil.rmtree(folder / "kfac", ignore_errors=True)
    settings = {"optimizer": "kfac", "lr": None, "weight_decay": None, "batch_size": None}
    said = crew.alone(folder / "kfac", settings | {"epochs": None, "seconds": took})
    return {**{name: said[name] for name in ("value", "score", "seconds")}, "folder": "kfac"}


def _write(study: optuna.Study, folder: Path) -> dict[str, Any]:
    result = record(study)
    write_json(folder / "tune.json", result)
    return result


def _page(folder: Path, result: dict[str, Any]) -> Path:
    """The page of the search, and those of the best trial and of K-FAC."""
    from hesse.report import build, build_tune

    for one in (result["best"], result["kfac"]):
        if one is not None and one["value"] is not None:
            build(folder / one["folder"])
    return build_tune(folder)


def _clear(folder: Path) -> None:
    for name in RECORDS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _line(trial: dict[str, Any]) -> str:
    params = ", ".join(f"{name} {value:.3g}" for name, value in trial["params"].items())
    value = "" if trial["value"] is None else f"  valid loss {trial['value']:.4f}"
    return f"trial {trial['number']:>3}  {trial['state']:<8}  {params}{value}" + (
        f"  {trial['error']}" if trial["error"] else ""
    )


def _summary(result: dict[str, Any], page: Path, timeout: float | None) -> str:
    def shown(what: str, one: dict[str, Any]) -> str:
        score = "" if one["score"] is None else f", {result['part']} {result['score']} {one['score']:.4f}"
        loss = "-" if one["value"] is None else f"{one['value']:.4f}"
        return f"{what}: valid loss {loss}{score}, {one['seconds']:.1f} s"

    best, kfac = result["best"], result["kfac"]
    none = "no trial ended" if timeout is None else f"no trial ended; none began after the timeout of {timeout:g} s"
    lines = [shown(f"best of {len(result['trials'])} trials, {best['folder']}", best)] if best else [none]
    lines += [f"all trials together: {result['seconds']:.1f} s"]
    lines += [shown("kfac, no search", kfac)] if kfac else []
    return "\n".join([*lines, f"page: {page}"])
