"""Text: characters become codes, codes become vectors, and convolutions look for groups of letters.

No words are cut and no language is assumed, so any script works, and a typing error spoils only the groups of
letters it touches. Characters are normalised to Unicode's NFKC, which makes equal what looks equal (composed
and decomposed accents, full-width and half-width forms, ligatures). Case is kept: it can carry the answer,
the forms that NFKC merges hardly ever do.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hesse.multimodal.encoders import FEATURES, he_, read_sample

__all__ = ["PADDING", "UNKNOWN", "Encoder", "decode", "normalise", "plan", "storage"]

PADDING, UNKNOWN = 0, 1

LONGEST = 256  # characters
LARGEST_ALPHABET = 4096  # characters; enough for most of what is written in Chinese
SAMPLE = 20_000  # texts looked at by a plan
WIDTH = 32  # of a character's vector


def normalise(text: str) -> str:
    """NFKC of the beginning of ``text``, as much as can matter.

    Example:
        >>> normalise("ﬁve ５") == normalise("five 5"), normalise("e\\u0301") == "é"
        (True, True)
    """
    # Four characters seldom compose into less than one; half a surrogate pair has no place in UTF-8.
    start = text[: 4 * LONGEST].encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFKC", start)[:LONGEST]


def plan(values: Sequence[str]) -> dict[str, Any]:
    """Choose the alphabet and the length from the training texts.

    Args:
        values: texts; about 20 000 of them, evenly spaced, are read.

    Returns:
        ``length`` in characters, the 99th percentile, at most 256; ``alphabet``, the characters that stand in
        two texts or more, most frequent first. Rarer ones share one code, which is so trained for those never
        seen. ``note`` where less than half of a text is read.
    """
    texts = read_sample(values, normalise, SAMPLE)
    counts = Counter(character for text in texts for character in sorted(set(text)))
    alphabet = "".join(c for c, count in counts.most_common(LARGEST_ALPHABET) if count > 1)
    length = max(1, int(np.quantile([len(text) for text in texts], 0.99, method="higher")))
    cut = {"note": f"of longer ones the first {length} characters"}
    return {"length": length, "alphabet": alphabet} | (cut if max(map(len, values)) > 2 * length else {})


def storage(settings: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape ``(length,)`` and dtype (int16) of a decoded text."""
    return (settings["length"],), np.dtype(np.int16)


def decode(value: str, settings: dict[str, Any]) -> NDArray[np.int16]:
    """The codes of one text's characters, cut or padded to the planned length.

    Returns:
        int16 ``[length]``: 0 for padding, 1 for a character outside the alphabet, else 2 + its place in the
        alphabet.

    Example:
        >>> decode("tea!", {"length": 6, "alphabet": "aet"})
        array([4, 3, 2, 1, 0, 0], dtype=int16)
    """
    codes, length = _codes(settings["alphabet"]), settings["length"]
    result = np.full(length, PADDING, np.int16)
    text = normalise(value)[:length]
    result[: len(text)] = [codes.get(character, UNKNOWN) for character in text]
    return result


class Encoder(nn.Module):
    """Two convolutions over the characters, then mean and maximum: int16 ``[B, length]`` to ``[B, 64]``.

    Padding is masked after every layer, so that a text's features do not depend on how far it was padded.

    Example:
        >>> encoder = Encoder({"length": 4, "alphabet": "aet"})
        >>> short, long = torch.tensor([[4, 3, 2, 0]]), torch.tensor([[4, 3, 2, 0, 0, 0]])
        >>> torch.allclose(encoder(short), encoder(long), atol=1e-6)
        True
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 + len(settings["alphabet"]), WIDTH)
        # An unknown character starts by saying nothing, and stays so where training meets none.
        nn.init.zeros_(self.embedding.weight[: UNKNOWN + 1].detach())
        self.conv1 = he_(nn.Conv2d(WIDTH, 64, (1, 3), padding=(0, 1)))
        self.conv2 = he_(nn.Conv2d(64, 64, (1, 3), padding=(0, 1)))
        self.features = he_(nn.Linear(2 * 64, FEATURES))
        with torch.no_grad():  # a maximum over positions is about twice as large as what stands at one of them
            self.features.weight[:, 64:] /= 2

    def forward(self, data: Tensor) -> Tensor:
        written = (data != PADDING).to(self.embedding.weight.dtype)[:, None, None, :]  # [B, 1, 1, length]
        x = self.embedding(data.long()).transpose(1, 2).unsqueeze(2) * written  # [B, WIDTH, 1, length]
        x = F.relu(self.conv1(x)) * written
        x = F.relu(self.conv2(x)) * written
        x = x.squeeze(2)
        mean = x.sum(dim=-1) / written.sum(dim=-1).squeeze(-1).clamp(min=1)
        # After ReLU nothing is below the zeros of the padding, so the maximum needs no mask of its own.
        return F.relu(self.features(torch.cat([mean, x.amax(dim=-1)], dim=1)))


@lru_cache(maxsize=64)
def _codes(alphabet: str) -> dict[str, int]:
    return {character: code for code, character in enumerate(alphabet, start=UNKNOWN + 1)}
