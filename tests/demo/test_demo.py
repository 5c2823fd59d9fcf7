"""The built-in data: real files, the same every time, clean enough before they are spoiled."""

import csv
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from hesse import demo
from hesse.demo import spoken, words, written
from hesse.finding import InputError

ROWS = 300


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo") / "цифры", rows=ROWS, seed=3)


def read(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The table and its files


def test_every_row_names_files_of_the_promised_shape(table: Path) -> None:
    rows = read(table)
    assert len(rows) == ROWS
    for row in rows:
        with Image.open(table.parent / row["image"]) as image:
            assert (image.mode, image.size, image.format) == ("L", (written.SIZE, written.SIZE), "PNG")
        info = soundfile.info(table.parent / row["sound"])
        assert (info.samplerate, info.channels, info.subtype, info.format) == (8000, 1, "PCM_16", "WAV")
        assert 0.25 < info.duration < 1.0
        assert row["word"] and row["word"] == row["word"].strip()
    assert len(contents(table.parent)) == 2 * ROWS + 1


def test_sounds_are_neither_silent_nor_cut_off(table: Path) -> None:
    for row in read(table):
        samples, _ = soundfile.read(table.parent / row["sound"], dtype="int16")
        peak = np.abs(samples.astype(int)).max()
        assert 2000 < peak < 32767


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    first, again, other = (
        demo.write(tmp_path / name, rows=30, seed=seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert contents(first.parent) == contents(again.parent)
    assert first.read_bytes() != other.read_bytes()


def test_classes_are_balanced_like_the_written_digits(table: Path) -> None:
    counts = np.bincount([int(row["digit"]) for row in read(table)], minlength=10)
    assert (counts == ROWS // 10).all()
    scans, shown = written.digits()
    everything = demo._balanced(shown, len(scans), np.random.default_rng(0))
    assert sorted(everything) == list(range(1797))  # all of them, each once: exactly their balance


def test_rows_are_in_no_order_of_class(table: Path) -> None:
    digits = np.array([int(row["digit"]) for row in read(table)])
    assert 0.03 < (digits[1:] == digits[:-1]).mean() < 0.2


@pytest.mark.parametrize("rows", [0, 1798])
def test_more_rows_than_digits_are_refused(tmp_path: Path, rows: int) -> None:
    with pytest.raises(InputError, match=f"must be 1 to 1797.*got {rows}"):
        demo.write(tmp_path / "x", rows=rows)
    assert not (tmp_path / "x").exists()


def test_one_row_is_enough(tmp_path: Path) -> None:
    assert len(read(demo.write(tmp_path, rows=1))) == 1


# Written digits


def test_what_is_rubbed_out_is_a_rectangle_of_the_asked_size() -> None:
    ink = np.ones((500, 8, 8), np.float32)
    pictures = written.spoil(ink, np.random.default_rng(0), grain=0.0, hole=(3, 3))
    # Ink is 191, paper 64; the corners of each 2 x 2 block of a linear enlargement keep away from both.
    erased = (191 - pictures.astype(float)).sum(axis=(1, 2)) / (191 - 64) / 4
    assert erased == pytest.approx(9, abs=0.5)
    assert np.ptp(pictures.mean(axis=0)) > 10  # not always in the same place


def test_untouched_pictures_are_the_scans_enlarged() -> None:
    scans, _ = written.digits()
    pictures = written.spoil(scans, np.random.default_rng(0), grain=0.0, hole=(0, 0))
    small = pictures.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)) / 255 * 2 - 0.5
    correlation = np.corrcoef(small.ravel(), scans.ravel())[0, 1]
    assert correlation > 0.97


def test_grain_has_the_asked_strength() -> None:
    half = np.full((2000, 8, 8), 0.5, np.float32)
    pictures = written.spoil(half, np.random.default_rng(0), grain=0.2, hole=(0, 0)) / 255 * 2 - 0.5
    # A pixel of the picture is 9, 3, 3 and 1 sixteenths of four scan pixels: 0.625 of their deviation.
    assert pictures[:, 4, 4].std() == pytest.approx(0.2 * 0.625, rel=0.1)


# Number words


@pytest.mark.parametrize("language", words.LANGUAGES)
def test_every_language_has_ten_distinct_words_in_composed_form(language: str) -> None:
    _, ten = words.LANGUAGES[language]
    assert len(ten) == len(set(ten)) == 10
    assert all(unicodedata.is_normalized("NFC", word) for word in ten)


@pytest.mark.parametrize("language", words.LANGUAGES)
def test_stray_keys_are_of_the_script_of_the_words(language: str) -> None:
    (first, last), ten = words.LANGUAGES[language]
    script = unicodedata.name(ten[1][0]).split()[0]
    assert unicodedata.name(first).startswith(script) and unicodedata.name(last).startswith(script)
    assert all(unicodedata.category(chr(c)) in ("Ll", "Lo") for c in range(ord(first), ord(last) + 1))


def test_there_are_twenty_languages_in_a_dozen_scripts() -> None:
    scripts = {unicodedata.name(ten[1][0]).split()[0] for _, ten in words.LANGUAGES.values()}
    assert len(words.LANGUAGES) == 20 and len(scripts) == 12


def test_no_word_stands_for_two_digits() -> None:
    meanings: dict[str, set[int]] = {}
    for _, ten in words.LANGUAGES.values():
        for digit, word in enumerate(ten):
            meanings.setdefault(word, set()).add(digit)
    assert all(len(digits) == 1 for digits in meanings.values())


def test_errors_never_turn_a_word_into_that_of_another_digit() -> None:
    digits = np.arange(4000) % 10
    meaning = {word: digit for _, ten in words.LANGUAGES.values() for digit, word in enumerate(ten)}
    typed = words.spell(digits, np.random.default_rng(0), errors=0.6)
    assert all(meaning.get(text, digit) == digit for text, digit in zip(typed, digits, strict=True))


def test_each_kind_of_error_occurs_and_without_errors_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    assert words.mistype("пять", "ая", rng, 0.0) == "пять"
    typed = [words.mistype("ab", "zz", rng, 0.5) for _ in range(200)]
    assert {"zb", "az", "a", "b", "ba", "zab", "azb", "zz"} <= set(typed)
    assert "" not in typed


def test_the_share_of_wrong_letters_is_the_asked_one() -> None:
    rng = np.random.default_rng(0)
    typed = [words.mistype("abcdefgh", "zz", rng, 0.25) for _ in range(4000)]
    assert np.mean([text == "abcdefgh" for text in typed]) == pytest.approx(0.75**8, abs=0.03)


# Spoken digits


def quiet_voices(count: int, pitch: float = 100.0) -> spoken.Voices:
    return spoken.Voices(*(np.full(count, x, np.float32) for x in (pitch, 1.0, 1.0)))


@pytest.mark.parametrize("vowel", ["iy", "ih", "eh", "aa", "ao", "uw", "ah", "er"])
def test_formants_of_a_vowel_lie_where_the_table_says(vowel: str) -> None:
    """At a low pitch the spectrum's envelope peaks at F1 and F2 (F3 can be a mere shoulder of F4)."""
    waves, samples = spoken.utter([[vowel] * 8], quiet_voices(1, 50.0), np.random.default_rng(0))
    middle = waves[0, samples[0] // 4 : samples[0] // 4 + 2048] * np.hanning(2048)
    spectrum = np.abs(np.fft.rfft(middle, 8192))
    frequency = np.fft.rfftfreq(8192, 1 / spoken.RATE)
    harmonics = np.arange(2, 70) * 50.0
    envelope = np.array([spectrum[np.abs(frequency - h) < 30].max() for h in harmonics])
    # The glottal source falls by 12 dB an octave and the lips return 6: undo that before looking for peaks.
    envelope *= harmonics
    peaks = harmonics[1:-1][(envelope[1:-1] > envelope[:-2]) & (envelope[1:-1] >= envelope[2:])]
    for formant in spoken.PHONEMES[vowel][1:3]:
        assert np.abs(peaks - formant).min() <= 75, (vowel, formant, peaks)


def test_the_pitch_is_the_asked_one() -> None:
    waves, samples = spoken.utter([["aa"] * 6], quiet_voices(1, 100.0), np.random.default_rng(0))
    middle = waves[0, samples[0] // 2 - 800 : samples[0] // 2 + 800]
    correlation = np.correlate(middle, middle, "full")[len(middle) :]
    assert spoken.RATE / (1 + 40 + correlation[40:160].argmax()) == pytest.approx(100, rel=0.05)


def test_resonators_step_as_a_plain_cascade() -> None:
    """All resonators at once, each a sample late, against one after the other in a textbook loop."""
    rng = np.random.default_rng(0)
    frames, n = 3, 3 * spoken.FRAME
    voice, breath, hiss = rng.standard_normal((3, n, 2)).astype(np.float32)
    centre, width = rng.uniform(200, 3500, (frames, 6, 2)), rng.uniform(50, 400, (frames, 6, 2))
    centre[:] = centre[:1]  # constant: a delay then shifts the output and nothing else
    width[:] = width[:1]

    def resonator(x: np.ndarray, k: int, unity: bool) -> np.ndarray:
        y = np.zeros((n + 2, 2))
        c = -np.exp(-2 * np.pi * width[0, k] / spoken.RATE)
        b = 2 * np.exp(-np.pi * width[0, k] / spoken.RATE) * np.cos(2 * np.pi * centre[0, k] / spoken.RATE)
        a = 1 - b - c if unity else 1 - np.sqrt(-c)
        for t in range(n):
            y[t + 2] = a * x[t] + b * y[t + 1] + c * y[t]
        return y[2:]

    def late(x: np.ndarray, by: int) -> np.ndarray:
        return np.concatenate([np.zeros((by, 2)), x[: n - by]])

    tract = late(resonator(voice, 0, True), 1) + breath
    for k in (1, 2, 3, 4):
        tract = resonator(tract, k, True)
    expected = late(tract, 3) + resonator(hiss, 5, False)
    assert spoken._resonate(voice, breath, hiss, centre, width) == pytest.approx(expected, abs=1e-3)


def log_spectra(waves: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """[N, 16, 20]: log power in 16 parts of each utterance and 20 bands."""
    pictures = []
    for wave, n in zip(waves, samples, strict=True):
        starts = np.linspace(0, n - 256, 16).astype(int)
        pieces = np.stack([wave[s : s + 256] for s in starts]) * np.hanning(256)
        power = np.abs(np.fft.rfft(pieces)) ** 2
        pictures.append(np.log(power[:, :120].reshape(16, 20, 6).sum(axis=2) + 1e-2))
    return np.array(pictures)


def test_clean_words_can_be_told_apart_by_the_nearest_mean_spectrum() -> None:
    digits = np.arange(400) % 10
    waves, samples = spoken.say(digits, np.random.default_rng(0))
    spectra = log_spectra(waves, samples).reshape(400, -1)
    means = np.stack([spectra[:200][digits[:200] == d].mean(axis=0) for d in range(10)])
    nearest = ((spectra[200:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == digits[200:]).mean() > 0.9


def test_a_wave_is_of_unit_power_and_silent_after_its_end() -> None:
    waves, samples = spoken.say(np.arange(10), np.random.default_rng(0))
    for wave, n in zip(waves, samples, strict=True):
        assert np.mean(wave[:n] ** 2) == pytest.approx(1, rel=1e-3)
        assert not wave[n:].any()


def test_babble_is_as_loud_as_asked() -> None:
    """At -6 dB the part of the mixture that is the word has a fifth of the power."""
    waves, samples = spoken.say(np.arange(40) % 10, np.random.default_rng(0))
    mixtures = spoken.overlay(waves, samples, np.random.default_rng(1), decibels=(-6, -6))
    ratios = []
    for wave, n, mixture in zip(waves, samples, mixtures, strict=True):
        word, x = wave[:n].astype(float), mixture.astype(float)
        assert len(x) == n
        share = (word @ x) ** 2 / (word @ word) / (x @ x)  # squared cosine: the word's share of the power
        ratios.append(share)
    assert np.median(ratios) == pytest.approx(1 / (1 + 10**0.6), rel=0.2)
