"""A file as it was when reading began: size, time of change and number on the disk.

A table that somebody writes to while it is read is half of one table and half of another. A reader takes a stamp
before it begins and compares afterwards; who reads a file again and again compares each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hesse.finding import InputError

__all__ = ["Stamp"]


@dataclass(frozen=True)
class Stamp:
    """Whether a file is still the same.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "pets.csv")
        ...     _ = path.write_text("name,weight")
        ...     before = Stamp.of(path)
        ...     before.require(path, "pets.csv")
        ...     _ = path.write_text("name,weight,species")
        ...     try:
        ...         before.require(path, "pets.csv")
        ...     except InputError as error:
        ...         print(error.finding.kind, "|", error.finding.message)
        table changed | The file was changed while it was read: it had 11 bytes and has 19.
    """

    size: int
    changed: int
    number: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of the file as it is now."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def require(self, path: Path, name: str) -> None:
        """Raise InputError (kind ``"table changed"``) if the file is not what it was."""
        try:
            now = Stamp.of(path)
        except FileNotFoundError:
            how = "it is gone"
        else:
            if now == self:
                return
            how = f"it had {self.size} bytes and has {now.size}" if now.size != self.size else "its content is newer"
            how = how if now.number == self.number else f"another file is in its place ({how})"
        raise InputError(
            "table changed",
            name,
            f"The file was changed while it was read: {how}.",
            "Wait until it is written, or work on a copy.",
        )
