"""Features on disk, by the content they were computed from: equal bytes give equal features, in this run and the next.

An entry is a small file of its own: the features as float32, behind a digest of them. It is written beside its place
and renamed, so that processes may share the folder; one that is damaged or cut short does not match its digest and
counts as absent. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cache", "cache_folder", "content_of"]

DIGEST = 16  # bytes


def cache_folder() -> Path:
    """``$HESSE_CACHE``, or ``hesse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own, shared = os.environ.get("HESSE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "hesse"


def content_of(value: Path | str) -> str:
    """A hash of a file's bytes or of a text.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(value, str):
        return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    with value.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Cache:
    """Features of one model, ``width`` numbers each, in a folder named by what they depend on beside the content.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(Path(folder), 2)
        ...     cache.put("ab12", np.ones(2, np.float32))
        ...     cache.get("ab12"), cache.get("cd34")
        (array([1., 1.], dtype=float32), None)
    """

    folder: Path
    width: int

    def get(self, content: str) -> NDArray[np.float32] | None:
        """The features of a content, or None if they are not there whole."""
        try:
            entry = self._place(content).read_bytes()
        except OSError:
            return None
        if len(entry) != DIGEST + 4 * self.width or _digest(entry[DIGEST:]) != entry[:DIGEST]:
            return None
        return np.frombuffer(entry[DIGEST:], "<f4").astype(np.float32)

    def put(self, content: str, features: NDArray[np.float32]) -> None:
        """Keep the features of a content.

        Raises:
            OSError: the disk is full, or the folder may not be written.
        """
        place, data = self._place(content), features.astype("<f4").tobytes()
        place.parent.mkdir(parents=True, exist_ok=True)
        # Not flushed to disk one by one, which would take minutes: the digest tells a torn entry.
        handle, name = tempfile.mkstemp(prefix=".", dir=place.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(data) + data)
            Path(name).replace(place)
        finally:
            Path(name).unlink(missing_ok=True)

    def _place(self, content: str) -> Path:
        return self.folder / content[:2] / content[2:]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]
