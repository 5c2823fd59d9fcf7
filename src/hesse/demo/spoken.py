"""Spoken digits by formant synthesis: a buzz and a hiss, coloured by the resonances of a vocal tract.

Speech is a source through a filter. The source is a train of glottal pulses (voiced sounds), noise made at
the glottis (aspiration) or noise made at a constriction (frication); the filter is a cascade of resonators,
one a formant. A word is a list of phonemes; each phoneme names where the formants lie and how loud the
sources are, and the parameters glide from one phoneme's targets to the next. This is the cascade branch of
Klatt's synthesiser, with one resonator for frication in place of his parallel branch, and without his nasal
zero.

Sources:
    Formants of vowels: Peterson and Barney, "Control methods used in a study of the vowels", J. Acoust. Soc.
    Am. 24 (1952), averages of the men. Resonators, bandwidths, F4 and formants of consonants: Klatt,
    "Software for a cascade/parallel formant synthesizer", J. Acoust. Soc. Am. 67 (1980). Durations and levels
    of the sources were set by comparing spectrograms with those of recorded digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PHONEMES", "RATE", "WORDS", "Phoneme", "Voices", "draw_voices", "overlay", "say", "utter"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

RATE = 8000
"""Samples a second, in every file."""

FRAME = 40
"""Samples between changes of the formants: 5 ms, as in Klatt's synthesiser."""

CHUNK = 256
"""Utterances synthesised at once: enough to share the cost of the loop over time, few enough for cache."""


class Phoneme(NamedTuple):
    """Targets of one sound: its duration in ms, frequencies and bandwidths in Hz, levels of the sources."""

    ms: float
    f1: float
    f2: float
    f3: float
    b1: float
    b2: float
    b3: float
    voice: float = 0.0  # glottal pulses
    breath: float = 0.0  # noise at the glottis, through all formants
    hiss: float = 0.0  # noise at the constriction, through one resonance of the cavity before it
    hiss_at: float = 3800.0
    hiss_width: float = 600.0


PHONEMES = {  # names as in TIMIT; a closure ("kcl", "tcl") is the silence before a stop's release
    "iy": Phoneme(110, 270, 2290, 3010, 60, 200, 400, voice=1.0),
    "ih": Phoneme(100, 390, 1990, 2550, 50, 100, 140, voice=1.0),
    "eh": Phoneme(110, 530, 1840, 2480, 60, 90, 200, voice=1.0),
    "aa": Phoneme(130, 730, 1090, 2440, 130, 70, 160, voice=1.0),
    "ao": Phoneme(130, 570, 840, 2410, 90, 100, 80, voice=1.0),
    "uh": Phoneme(110, 440, 1020, 2240, 80, 100, 80, voice=0.9),
    "uw": Phoneme(240, 300, 870, 2240, 65, 110, 140, voice=1.0),
    "ah": Phoneme(150, 640, 1190, 2390, 80, 50, 140, voice=1.0),
    "er": Phoneme(150, 490, 1350, 1690, 100, 60, 110, voice=1.0),
    "w": Phoneme(90, 290, 610, 2150, 50, 80, 60, voice=0.8),
    "r": Phoneme(80, 310, 1060, 1380, 70, 100, 120, voice=0.8),
    "n": Phoneme(100, 270, 1340, 2470, 40, 300, 300, voice=0.5),  # F1 is the nasal pole; the zero is left out
    "f": Phoneme(110, 340, 1100, 2080, 200, 120, 150, hiss=0.04, hiss_at=2000, hiss_width=3000),
    "v": Phoneme(70, 220, 1100, 2080, 60, 90, 120, voice=0.35, hiss=0.025, hiss_at=2000, hiss_width=3000),
    "th": Phoneme(110, 320, 1290, 2540, 200, 90, 200, hiss=0.025, hiss_at=3000, hiss_width=2500),
    "s": Phoneme(130, 320, 1390, 2530, 200, 80, 200, hiss=0.07),
    "z": Phoneme(90, 240, 1390, 2530, 70, 60, 180, voice=0.35, hiss=0.035),
    "kcl": Phoneme(60, 300, 1990, 2850, 250, 160, 330),
    "k": Phoneme(20, 300, 1990, 2850, 250, 160, 330, breath=0.06, hiss=0.4, hiss_at=2000, hiss_width=600),
    "tcl": Phoneme(60, 400, 1600, 2600, 300, 120, 250),
    "t": Phoneme(15, 400, 1600, 2600, 300, 120, 250, hiss=0.15, hiss_at=3500, hiss_width=1000),
    "hh": Phoneme(45, 330, 1250, 2200, 300, 120, 250, breath=0.25),  # the aspiration of a released /t/
}

WORDS = tuple(
    word.split()
    for word in (
        "z ih r ao uh",  # zero
        "w ah n",  # one
        "t hh uw",  # two
        "th r iy iy",  # three
        "f ao ao r",  # four
        "f aa ih v",  # five
        "s ih kcl k s",  # six
        "s eh v ah n",  # seven
        "eh ih tcl t",  # eight
        "n aa ih n",  # nine
    )
)
"""Phonemes of the ten English words; a diphthong is the glide between two vowels."""


class Voices(NamedTuple):
    """How each of N utterances is spoken. Every field is an array [N]."""

    pitch: Floats  # Hz, at the middle of the utterance
    tract: Floats  # factor on every resonance: 1 for Peterson and Barney's men, about 1.17 for their women
    tempo: Floats  # factor on every duration


def draw_voices(count: int, rng: np.random.Generator) -> Voices:
    """Speakers from deep and long-throated to high and short, each saying one word in their own time."""
    height = rng.random(count)
    pitch = 90 * 2.5**height * rng.lognormal(0, 0.08, count)
    tract = (0.92 + 0.3 * height) * rng.lognormal(0, 0.03, count)
    return Voices(*(x.astype(np.float32) for x in (pitch, tract, rng.uniform(0.8, 1.25, count))))


def say(digits: Integers, rng: np.random.Generator) -> tuple[Floats, Integers]:
    """Speak the English words of ``digits`` [N], each in a voice of its own.

    Returns:
        Waves [N, samples] of root mean square 1, silent after their ends, and the samples that each has [N].

    Example:
        >>> waves, samples = say(np.arange(10), np.random.default_rng(0))
        >>> waves.shape == (10, samples.max())
        True
    """
    parts = [
        utter([WORDS[d] for d in digits[i : i + CHUNK]], draw_voices(len(digits[i : i + CHUNK]), rng), rng)
        for i in range(0, len(digits), CHUNK)
    ]
    samples = np.concatenate([part[1] for part in parts])
    waves = np.zeros((len(digits), samples.max()), np.float32)
    for i, (wave, _) in enumerate(parts):
        waves[i * CHUNK : i * CHUNK + len(wave), : wave.shape[1]] = wave
    return waves, samples


def utter(words: Sequence[Sequence[str]], voices: Voices, rng: np.random.Generator) -> tuple[Floats, Integers]:
    """Synthesise N words, each a list of names in :data:`PHONEMES`; returns as :func:`say`."""
    targets, edges = _plan(words, voices.tempo, rng)
    seconds = edges[:, -1] + rng.uniform(0.03, 0.08, len(words))
    samples = (seconds * RATE).astype(np.int64)
    times = np.arange(-(-samples.max() // FRAME) + 1, dtype=np.float64) * (FRAME / RATE)

    levels = np.einsum("fpn,npk->kfn", _share(times, edges, 0.003), targets[:, :, 7:10])
    voice, breath, hiss = (_between_frames(level) for level in levels)
    noise = rng.standard_normal(voice.shape, dtype=np.float32)
    pulses = _pulses(voices.pitch, seconds, len(voice), rng)

    edges[:, [0, -1]] = -np.inf, np.inf  # the mouth is in place before the first sound and after the last
    share = _share(times[:-1], edges, 0.012)
    f1, f2, f3, b1, b2, b3 = np.einsum("fpn,npk->kfn", share, targets[:, :, 1:7])
    hiss_at, hiss_width = np.einsum("fpn,npk->kfn", share, targets[:, :, 10:])
    zero = np.zeros_like(f1)
    # Klatt's glottal low-pass filter is a resonance at 0 Hz, 100 Hz wide; his F4 is the same in all sounds.
    centre = np.stack([zero, *(voices.tract * f for f in (f1, f2, f3, zero + 3300, hiss_at))], axis=1)
    width = np.stack([zero + 100, b1, b2, b3, zero + 250, hiss_width], axis=1)

    flow = _resonate(voice * pulses, breath * noise, hiss * noise, centre, width)
    waves = np.diff(flow[: samples.max()], axis=0, prepend=0).T  # the lips radiate the derivative of the flow
    waves[np.arange(waves.shape[1]) >= samples[:, None]] = 0
    waves /= np.sqrt((waves**2).sum(axis=1, keepdims=True) / samples[:, None])
    return np.ascontiguousarray(waves), samples


def overlay(
    waves: Floats,
    samples: Integers,
    rng: np.random.Generator,
    *,
    voices: int = 4,
    decibels: tuple[float, float] = (-7, 0),
) -> list[npt.NDArray[np.int16]]:
    """Mix each utterance with babble and turn it to 16-bit samples.

    Babble is ``voices`` utterances drawn from the same waves, each shifted by a time of its own (a common
    rhythm would betray it), and a little white noise. The ratio of speech to babble is drawn evenly from
    ``decibels``, the loudness from a range of 20 dB.

    Returns:
        One array for each utterance, as long as ``samples`` says.
    """
    mixtures = []
    for wave, count in zip(waves, samples, strict=True):
        others = rng.integers(len(waves), size=voices)
        shifts = rng.integers(waves.shape[1], size=voices)
        babble = 0.1 * rng.standard_normal(count, dtype=np.float32)
        for other, shift in zip(others, shifts, strict=True):
            babble += np.roll(waves[other], shift)[:count]
        loudness = 10 ** (-rng.uniform(*decibels) / 20)
        mixture = wave[:count] + loudness * babble / np.sqrt(np.mean(babble**2))
        peak = 32767 * 10 ** rng.uniform(-1.05, -0.05)
        mixtures.append(np.rint(mixture * (peak / np.abs(mixture).max())).astype(np.int16))
    return mixtures


def _plan(words: Sequence[Sequence[str]], tempo: Floats, rng: np.random.Generator) -> tuple[Doubles, Doubles]:
    """Targets [N, P, 12] of the phonemes of each word and the edges between them [N, P + 1], in seconds."""
    length = max(map(len, words))
    # A short word is filled up with its last phoneme, lasting no time.
    full = [[PHONEMES[p] for p in [*word, *[word[-1]] * (length - len(word))]] for word in words]
    targets = np.array(full, np.float64)
    targets[np.arange(length) >= np.array([len(word) for word in words])[:, None], 0] = 0
    spans = targets[:, :, 0] / 1000 * tempo[:, None] * rng.lognormal(0, 0.1, (len(words), length))
    lead = rng.uniform(0.03, 0.08, (len(words), 1))
    return targets, np.cumsum(np.concatenate([lead, spans], axis=1), axis=1)


def _share(times: Doubles, edges: Doubles, glide: float) -> Doubles:
    """How much each phoneme counts at each time, [F, P, N]: soft steps at the edges, ``glide`` seconds wide.

    Times [F] and edges [N, P + 1] are in seconds; between the first edge and the last the shares add to 1.
    """
    begun = 0.5 + 0.5 * np.tanh((times[:, None, None] - edges.T) / (2 * glide))
    return begun[:, :-1] - begun[:, 1:]


def _between_frames(values: Doubles) -> Floats:
    """Straight lines between the frames: [F + 1, N] to [F * FRAME, N]."""
    part = (np.arange(FRAME, dtype=np.float32) / FRAME)[:, None]
    left, right = values[:-1, None].astype(np.float32), values[1:, None].astype(np.float32)
    return (left + part * (right - left)).reshape(-1, values.shape[1])


def _pulses(pitch: Floats, seconds: Doubles, count: int, rng: np.random.Generator) -> Floats:
    """Impulses [count, N], one a period, as high as gives vowels a level near 1.

    The pitch [N] in Hz falls by a quarter through the word, as in a statement.
    """
    fall = 0.125 - 0.25 * np.arange(count)[:, None] / (RATE * seconds)
    phase = rng.random(len(pitch)) + np.cumsum(pitch / RATE * (1 + fall), axis=0)
    return (1000 * np.diff(np.floor(phase), axis=0, prepend=np.floor(phase[:1]))).astype(np.float32)


def _resonate(voice: Floats, breath: Floats, hiss: Floats, centre: Doubles, width: Doubles) -> Floats:
    """Run the sources [samples, N] through resonators [F, 6, N]: glottis, F1 to F4, hiss.

    Each is ``y[n] = a x[n] + b y[n - 1] + c y[n - 2]`` with ``c = -exp(-2 pi width / RATE)``,
    ``b = 2 exp(-pi width / RATE) cos(2 pi centre / RATE)`` and ``a = 1 - b - c``, which is gain 1 at 0 Hz.
    """
    radius = np.exp(-np.pi * width / RATE)
    b = (2 * radius * np.cos(2 * np.pi * np.minimum(centre, 0.48 * RATE) / RATE)).astype(np.float32)
    c = (-(radius**2)).astype(np.float32)
    a = 1 - b - c
    # The hiss gets about gain 1 at its own centre instead, so that levels at different centres compare.
    a[:, 5] = 1 - radius[:, 5]
    x, y, before, term = np.zeros((4, *a.shape[1:]), np.float32)
    out = np.empty_like(voice)
    for n in range(len(voice)):
        # Every resonator hears its predecessor one sample late: the cascade is the same but for a delay of
        # four samples, and all its members step together.
        x[0] = voice[n]
        x[1:5] = y[:4]
        x[1] += breath[n]
        x[5] = hiss[n]
        frame = n // FRAME
        before *= c[frame]
        np.multiply(b[frame], y, out=term)
        before += term
        np.multiply(a[frame], x, out=term)
        before += term
        y, before = before, y
        np.add(y[4], y[5], out=out[n])
    return out
