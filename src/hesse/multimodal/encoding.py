"""Text files are UTF-8, and a file that is not says so at its first wrong byte.

Latin-1 accepts any bytes, so a reader that guesses turns "Zürich" into "ZÃ¼rich" and trains on it. Here
nothing is guessed: a byte order mark is allowed, UTF-16 is recognised by its mark or its zero bytes, and
anything else that is not UTF-8 is refused with the line, the byte and the command that converts the file.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from hesse.finding import InputError

__all__ = ["refuse_compressed", "require_utf8"]

_BLOCK = 1 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


def require_utf8(path: Path, name: str) -> None:
    """Read through a text file once and raise at the first byte that is not UTF-8.

    Args:
        path: the file.
        name: how to call it in the error.

    Raises:
        InputError: kind ``"wrong encoding"``, naming the line and the byte.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "towns.csv")
        ...     _ = path.write_bytes("town\\nZürich\\n".encode("latin-1"))
        ...     try:
        ...         require_utf8(path, "towns.csv")
        ...     except InputError as error:
        ...         print(error.finding.where, "|", error.finding.value)
        towns.csv, line 2 | 0xfc
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, pending = 0, 0  # pending: bytes of an unfinished character at the end of the last block
    with path.open("rb") as file:
        block = file.read(_BLOCK)
        refuse_compressed(name, block)
        if block.startswith(_UTF16) or _looks_like_utf16(block):
            raise InputError(
                "wrong encoding",
                name,
                "The file is UTF-16 (Excel's 'Unicode text'), not UTF-8.",
                _remedy("UTF-16", name),
            )
        while True:
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.start counts from the bytes that the decoder had kept back from the block before.
                at = max(error.start - pending, 0)
                byte, line = error.object[error.start], lines + block.count(b"\n", 0, at) + 1
                raise InputError(
                    "wrong encoding",
                    f"{name}, line {line}",
                    f"The byte 0x{byte:02x} is not UTF-8; the file is probably Latin-1 or Windows-1252.",
                    _remedy("WINDOWS-1252", name),
                    value=f"0x{byte:02x}",
                ) from None
            if not block:
                return
            pending = len(decoder.getstate()[0])
            lines += block.count(b"\n")
            block = file.read(_BLOCK)


def refuse_compressed(name: str, start: bytes) -> None:
    """Raise InputError if a file begins as a compressed one does."""
    for sign, (kind, command) in _COMPRESSED.items():
        if start.startswith(sign):
            message = f"The file is compressed ({kind}), and tables are read as they are."
            raise InputError("compressed file", name, message, f"Unpack it: {command} '{name}'.", value=kind)


def _looks_like_utf16(block: bytes) -> bool:
    """Latin letters in UTF-16 without a mark: every second byte of the beginning is zero."""
    head = block[:64]
    return len(head) >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > len(head) // 3


def _remedy(encoding: str, name: str) -> str:
    return f"Convert it: iconv -f {encoding} -t UTF-8 '{name}' > 'utf8-{name}', or save it again as 'CSV UTF-8'."
