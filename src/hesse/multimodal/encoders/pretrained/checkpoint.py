"""A checkpoint is a folder: its weights, how its inputs are made, and an identity that tells it from every other.

Whatever ``transformers`` can load as an AutoModel is taken, from safetensors only (a pickle can run code), without
remote code and without the network, unless a name is given that is not a folder: then the hub's files are fetched once.
A model of two modalities (CLIP, SigLIP, CLAP) is cut to the tower that is asked for, an encoder with a decoder to its
encoder. Only what lies here imports ``transformers``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hesse.finding import InputError

__all__ = ["blocks_of", "folder_of", "identity_of", "load", "load_processor", "present_folder"]

INPUTS = {"image": ("pixel_values",), "text": ("input_ids",), "audio": ("input_values", "input_features")}
PROCESSORS = {"image": "AutoImageProcessor", "text": "AutoTokenizer", "audio": "AutoFeatureExtractor"}
KEPT = ("*.json", "*.safetensors", "*.txt", "*.model")  # weights, configuration and vocabularies
FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError)  # of transformers
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?$", re.ASCII)  # of a checkpoint on the hub


def folder_of(source: str) -> Path:
    """The folder of a checkpoint: itself, or where the hub's files of that name are kept.

    Raises:
        InputError: there is no such folder and no such name, or nothing can be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or not NAME.match(source)
    if looks_local:
        raise InputError(
            "no such checkpoint",
            source,
            "There is no such folder.",
            "Give the folder that save_pretrained wrote, or a name on the hub like google/vit-base-patch16-224.",
        )
    hub = _library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(KEPT), local_files_only=True))
    except (OSError, ValueError):
        pass  # not fetched before
    try:
        return Path(hub.snapshot_download(source, allow_patterns=list(KEPT)))
    except Exception as error:  # the client's errors and those of the network below it have no common root
        raise InputError(
            "no such checkpoint",
            source,
            f"This is no folder, and the hub did not give it: {_first_line(error)}",
            "Correct the path or the name; without a network, fetch the folder elsewhere and give its path.",
        ) from error


def identity_of(folder: Path) -> str:
    """A hash of the weights, the configuration and the vocabularies, 32 hexadecimal digits.

    Raises:
        InputError: the folder holds no ``config.json`` or no safetensors.
    """
    files = sorted(path for pattern in KEPT for path in folder.glob(pattern))
    if not (folder / "config.json").is_file():
        message = "The folder holds no config.json, which every checkpoint of transformers has."
        raise InputError("no checkpoint", str(folder), message, "Give the folder that save_pretrained wrote.")
    if not any(path.suffix == ".safetensors" for path in files):
        message = "The folder holds no weights as safetensors; pickled ones are not loaded, since they can run code."
        raise InputError(
            "no weights",
            str(folder),
            message,
            "Load the model where it is trusted, and save it: model.save_pretrained().",
        )
    return _identity(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def present_folder(settings: Mapping[str, Any]) -> Path:
    """Where the checkpoint of a column's settings is now.

    Raises:
        InputError: it is gone, or no longer the one that the settings were made with.
    """
    try:
        folder = folder_of(settings["source"])
    except InputError as error:
        f = error.finding
        message = f"An encoder of this run was read from there. {f.message}"
        raise InputError(f.kind, f.where, message, "Put the checkpoint back there, or a link to it.") from error
    identity = identity_of(folder)
    if identity != settings["identity"]:
        raise InputError(
            "changed checkpoint",
            settings["source"],
            "These are not the weights, the configuration and the vocabulary that the run was trained with.",
            "Put the checkpoint back that was there, or train anew.",
            value=identity,
        )
    return folder


def load(folder: Path, kind: str) -> nn.Module:
    """The part of a checkpoint that reads ``kind``, in eval mode and single precision, with plain attention.

    Raises:
        InputError: it cannot be loaded, lacks weights, or reads something else.
    """
    transformers = _library("transformers")
    try:
        with _quiet(transformers), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # what a checkpoint lacks (an unused pooler) is drawn
            model, info = transformers.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="eager",  # fused attention has no second derivatives
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (*FAILURES, SafetensorError) as error:
        message = f"transformers cannot load it: {_first_line(error)}"
        raise InputError(
            "unusable checkpoint", str(folder), message, "Check the folder with transformers.AutoModel.from_pretrained."
        ) from error
    lacking = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if lacking:
        raise InputError(
            "incomplete checkpoint",
            str(folder),
            f"It lacks {len(lacking)} weights of a {model.config.model_type} model, the first '{lacking[0]}'.",
            "Save the whole model again.",
            value=lacking[0],
        )
    part = getattr(model, {"image": "vision_model", "text": "text_model", "audio": "audio_model"}[kind], None)
    model = model if part is None else part
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    name = getattr(model, "main_input_name", "")
    if name not in INPUTS[kind]:
        reads = next((k for k, names in INPUTS.items() if name in names), name or "something else")
        raise InputError(
            "model of another modality",
            str(folder),
            f"The checkpoint is a {model.config.model_type} model, which reads {reads}; the column holds {kind}.",
            f"Choose a checkpoint for {kind}.",
            value=reads,
        )
    loaded: nn.Module = model.eval()
    return loaded


def load_processor(folder: Path, kind: str) -> Any:
    """What makes a checkpoint's inputs of pictures, texts or sounds.

    Raises:
        InputError: the folder holds none for ``kind``.
    """
    transformers = _library("transformers")
    options = {"backend": "pil"} if kind == "image" else {}
    try:
        with _quiet(transformers):
            automatic = getattr(transformers, PROCESSORS[kind])
            return automatic.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except FAILURES as error:
        files = "tokenizer.json and tokenizer_config.json" if kind == "text" else "preprocessor_config.json"
        raise InputError(
            "no processor",
            str(folder),
            f"transformers finds no {PROCESSORS[kind]} there: {_first_line(error)}",
            f"Add the checkpoint's {files}, or choose a checkpoint for {kind}.",
        ) from error


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a stack of: the largest list of modules of one class in it."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


@lru_cache(maxsize=64)
def _identity(files: tuple[tuple[str, int, int], ...]) -> str:
    """By size and time as well as by name, so that a file that changes is read again."""
    total = hashlib.sha256()
    for name, _, _ in files:
        path = Path(name)
        with path.open("rb") as file:
            total.update(json.dumps([path.name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return total.hexdigest()[:32]


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"Pretrained encoders need {name}. Install it with: pip install 'hesse[pretrained]'"
        raise ImportError(message, name=name) from error


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars and no advice on stderr: what matters is raised."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 300 else line[:299] + "…"
