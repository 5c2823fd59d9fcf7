"""The built-in data: ten digits as pictures, words and sounds, made on the spot and written to files.

Each row shows one digit three times: a written one, a number word in one of twenty languages, and a spoken
one. The three share only their class. They are made apart and paired by class, and are no recordings of one
event: given the digit, they are independent. What a fused model gains here is the agreement of three doubtful
witnesses, and nothing else.

Each modality is spoiled so that it does not suffice: some of its content is lost (ink, letters, sound under
babble), while every label stays true. The three modules share a shape: something clean, and what spoils it.
"""

from __future__ import annotations

import csv
import io
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hesse.demo import spoken, words, written
from hesse.files import write_text
from hesse.finding import InputError

__all__ = ["write"]


def write(folder: Path, *, rows: int = 1797, seed: int = 0) -> Path:
    """Write the table ``folder/digits.csv`` and the files it names; the same seed gives the same bytes.

    Its columns are ``image`` (path of a PNG, 16 x 16 grey pixels), ``sound`` (path of a 16-bit mono WAV at 8
    kHz, 0.3 to 0.9 s), ``word`` (text) and ``digit`` (0 to 9, the target).

    Args:
        folder: made if need be; files of an earlier call are written over.
        rows: how many rows, 1 to 1797. Each written digit is used once at most, so that no digit of the
            training rows comes back in the test rows. Classes are as balanced as they can be.
        seed: of all random choices.

    Returns:
        The path of the table.

    Raises:
        InputError: ``rows`` out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(write(Path(folder), rows=20).read_text(encoding="utf-8").splitlines()[0])
        image,sound,word,digit
    """
    scans, shown = written.digits()
    if not 1 <= rows <= len(scans):
        message = f"The number of rows must be 1 to {len(scans)}, one for each written digit; got {rows}."
        raise InputError("rows out of range", "hesse.demo.write", message, "Ask for fewer rows.", rows)
    choose, of_image, of_sound, of_word = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    chosen = _balanced(shown, rows, choose)
    digits = shown[chosen]

    pictures = written.spoil(scans[chosen], of_image)
    sounds = spoken.overlay(*spoken.say(digits, of_sound), of_sound)
    texts = words.spell(digits, of_word)

    # The table comes last and at one stroke: where there is a table, there are the files it names.
    for name in ("images", "sounds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "sound", "word", "digit"])
    for i, (picture, sound, text, digit) in enumerate(zip(pictures, sounds, texts, digits, strict=True), start=1):
        image_path, sound_path = f"images/{i:04d}.png", f"sounds/{i:04d}.wav"
        Image.fromarray(picture).save(folder / image_path)
        _write_wav(folder / sound_path, sound)
        writer.writerow([image_path, sound_path, text, digit])
    path = folder / "digits.csv"
    write_text(path, table.getvalue())
    return path


def _write_wav(path: Path, samples: npt.NDArray[np.int16]) -> None:
    """16-bit mono. Python's own writer: soundfile flushes each file to disk, as slow as all the synthesis."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(spoken.RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def _balanced(classes: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """``count`` places of ``classes`` [N] in random order, the classes as evenly as there are members."""
    order = rng.permutation(len(classes))
    turn = np.empty(len(classes), np.int64)  # 0 for the first member of each class in this order, 1 for the second
    for c in np.unique(classes):
        member = classes[order] == c
        turn[member] = np.arange(member.sum())
    return rng.permutation(order[np.argsort(turn, kind="stable")[:count]])
