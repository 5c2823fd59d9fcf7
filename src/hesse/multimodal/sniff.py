"""What a file is by its first bytes, whatever it is called: for telling someone what was found instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hesse.finding import InputError
from hesse.multimodal.columns import Column
from hesse.multimodal.table import Table

__all__ = ["instead", "kind_of", "refuse_exchanged"]

_SIGNS: tuple[tuple[int, bytes, str, str], ...] = (  # where, what, kind, name
    (0, b"\x89PNG\r\n\x1a\n", "image", "PNG"),
    (0, b"\xff\xd8\xff", "image", "JPEG"),
    (0, b"GIF8", "image", "GIF"),
    (0, b"BM", "image", "BMP"),
    (0, b"II*\0", "image", "TIFF"),
    (0, b"MM\0*", "image", "TIFF"),
    (8, b"WEBP", "image", "WebP"),
    (4, b"ftypavif", "image", "AVIF"),
    (8, b"WAVE", "audio", "WAV"),
    (0, b"fLaC", "audio", "FLAC"),
    (0, b"OggS", "audio", "Ogg"),
    (0, b"ID3", "audio", "MP3"),
    (8, b"AIF", "audio", "AIFF"),
    (0, b".snd", "audio", "AU"),
    (4, b"ftyp", "video", "MP4"),
    (0, b"%PDF", "document", "PDF"),
    (0, b"PK\x03\x04", "archive", "ZIP"),
    (0, b"<", "page", "HTML or XML"),
)
_WORDS = {"image": "picture", "audio": "sound"}


def kind_of(path: Path) -> tuple[str, str]:
    """The kind and the format of a file ("image", "PNG"); both empty if its first bytes say nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "photo.png")
        ...     _ = path.write_bytes(b"RIFF....WAVEfmt ")
        ...     kind_of(path)
        ('audio', 'WAV')
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return "", ""
    if start[:1] == b"\xff" and start[1:2] >= b"\xe0":  # eleven bits that are set begin a frame
        return "audio", "MP3"
    return next(((kind, name) for at, sign, kind, name in _SIGNS if start[at:].startswith(sign)), ("", ""))


def instead(error: InputError, value: Any, kind: str) -> InputError:
    """The same error, with what the file is if it is something else than ``kind``."""
    if not isinstance(value, Path):
        return error
    found, name = kind_of(value)
    if found in ("", kind.removesuffix("s")):
        return error
    f = error.finding
    message = f"The column holds {_WORDS[kind.removesuffix('s')]}s, and this is a {_WORDS.get(found, found)} ({name})."
    return InputError(f.kind, f.where, message, "Correct the path, or remove the row.", f.value)


def refuse_exchanged(
    table: Table,
    columns: Mapping[str, Column],
    files: Mapping[str, Sequence[Any]],
    errors: Mapping[str, Mapping[int, InputError]],
) -> None:
    """Raise if of two columns, by modality, each holds nothing but files of the other's kind: they were exchanged."""
    only: dict[str, str] = {}  # the kind of the files of a column none of which could be read
    for key, failed in errors.items():
        there = [file for file in files.get(key, ()) if isinstance(file, Path)]
        if there and len(failed) == len(there):
            kinds = {kind_of(file)[0] for file in there[:20]}
            only[key] = kinds.pop() if len(kinds) == 1 else ""
    for a, found in only.items():
        for b, other in only.items():
            if columns[a].kind == other != found == columns[b].kind:
                raise InputError(
                    "exchanged columns",
                    f"{table.name}, columns '{columns[a].name}' and '{columns[b].name}'",
                    f"'{columns[a].name}' held {_WORDS[columns[a].kind]}s in training and now holds {_WORDS[found]}s, "
                    f"'{columns[b].name}' the other way round.",
                    "Exchange the names of the two columns.",
                )
