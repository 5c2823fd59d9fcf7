"""Sound: rates, depths, channels, levels and lengths, the log-mel picture, and what damaged files get."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hesse.finding import InputError
from hesse.multimodal.encoders import FEATURES, audio

PLAN = {"rate": 8000, "samples": 4000, "mean": [0.0] * 32, "std": 1.0}


def sine(frequency: float, rate: int, seconds: float = 0.5, level: float = 0.3) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def save(path: Path, wave: np.ndarray, rate: int = 8000, **options: Any) -> Path:
    soundfile.write(str(path), wave, rate, **options)
    return path


def frequency(data: np.ndarray, rate: int = 8000) -> float:
    return float(np.abs(np.fft.rfft(data * np.hanning(len(data)))).argmax() * rate / len(data))


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        *[("x.wav", kind) for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")],
        *[("x.flac", kind) for kind in ("PCM_16", "PCM_24")],
        *[("x.ogg", "VORBIS"), ("x.aiff", "PCM_16")],
    ],
)
def test_every_depth_and_container_gives_the_same_sound(tmp_path: Path, name: str, subtype: str) -> None:
    wave = sine(440, 8000)
    data = audio.decode(save(tmp_path / name, wave, subtype=subtype), PLAN)
    assert (data.shape, data.dtype) == audio.storage(PLAN)
    expected = wave / np.abs(wave).max()
    inside = slice(200, 3800)  # Vorbis rings at the ends
    assert np.abs(data[inside] / 32767 - expected[inside]).max() < 0.08


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_the_pitch_and_the_length(tmp_path: Path, rate: int) -> None:
    data = audio.decode(save(tmp_path / "x.wav", sine(1000, rate), rate), PLAN)
    assert abs(frequency(data) - 1000) <= 2
    assert np.abs(data[-200:]).max() > 10_000  # half a second stays half a second


def test_resampling_does_not_alias(tmp_path: Path) -> None:
    """7 kHz does not fit into 8000 samples a second; folding it back would put it at 1 kHz."""
    wave = sine(7000, 44100) + 0.01 * sine(500, 44100)
    data = audio.decode(save(tmp_path / "x.wav", wave, 44100), PLAN)
    spectrum = np.abs(np.fft.rfft(data[500:-500]))
    assert frequency(data[500:-500]) == pytest.approx(500, abs=3)
    assert spectrum[round(1000 * 3000 / 8000)] < 0.05 * spectrum.max()


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = sine(500, 8000), sine(800, 8000)
    both = audio.decode(save(tmp_path / "s.wav", np.stack([left, right], 1), subtype="FLOAT"), PLAN)
    mono = audio.decode(save(tmp_path / "m.wav", (left + right) / 2, subtype="FLOAT"), PLAN)
    assert np.abs(both.astype(int) - mono).max() <= 1


@pytest.mark.parametrize(("gain", "offset"), [(1e-6, 0.0), (1.0, 0.0), (1e6, 0.0), (0.1, 0.5)])
def test_neither_level_nor_offset_matters(tmp_path: Path, gain: float, offset: float) -> None:
    wave = sine(440, 8000)
    plain = audio.decode(save(tmp_path / "a.wav", wave, subtype="FLOAT"), PLAN)
    other = audio.decode(save(tmp_path / "b.wav", gain * wave + offset, subtype="FLOAT"), PLAN)
    assert np.abs(plain).max() == 32767
    assert np.abs(plain.astype(int) - other).max() <= 3


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_stays_silence_with_finite_features(tmp_path: Path, level: float) -> None:
    path = save(tmp_path / "x.wav", np.full(4000, level), subtype="FLOAT")
    plan = audio.plan([path])
    data = audio.decode(path, plan)
    assert not data.any()
    assert audio.Encoder(plan)(torch.from_numpy(data)[None]).isfinite().all()


@pytest.mark.parametrize("samples", [1, 2, 63, 100])
def test_shorter_than_a_window(tmp_path: Path, samples: int) -> None:
    path = save(tmp_path / "x.wav", sine(900, 8000)[1 : 1 + samples], subtype="FLOAT")
    plan = audio.plan([path])
    assert plan["samples"] == samples
    assert audio.Encoder(plan)(torch.from_numpy(audio.decode(path, plan))[None]).isfinite().all()
    assert not audio.decode(path, PLAN)[samples:].any()  # zero behind the end of a short one


def test_a_long_sound_is_cut_to_its_loudest_part(tmp_path: Path) -> None:
    wave = 0.01 * sine(300, 16000, 20)
    wave[16000 * 12 : 16000 * 12 + 8000] += sine(1000, 16000)
    data = audio.decode(save(tmp_path / "x.wav", wave, 16000), PLAN)
    assert frequency(data) == pytest.approx(1000, abs=3)
    assert (np.abs(data.reshape(40, 100)).max(1) > 20_000).mean() > 0.95


def test_a_plan_is_json_within_its_limits_and_standardises(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [save(tmp_path / f"音{i}.wav", rng.normal(size=44100 * (i + 1)) * 0.1, 44100) for i in range(4)]
    plan = audio.plan(paths)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["rate"] == 16000
    assert 3.5 * 16000 < plan["samples"] <= 4 * 16000
    data = torch.from_numpy(np.stack([audio.decode(path, plan) for path in paths]))
    picture = audio.LogMel(plan["rate"], plan["samples"])(data) - torch.tensor(plan["mean"])[:, None]
    assert picture.mean().abs() < 1e-3
    assert picture.std() == pytest.approx(plan["std"], rel=1e-3)


def test_a_plan_is_at_most_ten_seconds(tmp_path: Path) -> None:
    assert audio.plan([save(tmp_path / "x.wav", np.ones(8000 * 30) * 0.1)])["samples"] == 80_000


@pytest.mark.parametrize("rate", [1000, 2000, 8000, 11025, 16000])
@pytest.mark.parametrize("samples", [1, 8000, 160_000])
def test_the_picture_has_the_announced_size_and_no_empty_band(rate: int, samples: int) -> None:
    mel = audio.LogMel(rate, samples)
    assert mel(torch.zeros(1, samples, dtype=torch.int16)).shape == (1, mel.bands, mel.columns)
    assert mel.columns <= 129
    assert (mel.filters.sum(1) > 0).all()


def test_the_picture_equals_the_definition() -> None:
    """Window by window with numpy, in float64."""
    x = np.random.default_rng(0).integers(-(2**15), 2**15, 1000).astype(np.int16)
    mel = audio.LogMel(8000, 1000)
    padded = np.pad(x / 32768, 128)
    window = np.zeros(256)
    window[28:228] = np.sin(np.pi * np.arange(200) / 200) ** 2
    window /= window.sum() / 2
    power = [np.abs(np.fft.rfft(padded[t : t + 256] * window)) ** 2 for t in range(0, 1001, 80)]
    expected = np.log(mel.filters.double().numpy() @ np.array(power).T + 1e-6)
    assert np.allclose(mel(torch.from_numpy(x)[None])[0], expected, atol=1e-4)


def test_a_batch_is_transformed_row_by_row() -> None:
    x = torch.randint(-3000, 3000, (30, 20_000), dtype=torch.int16)  # more than one chunk
    mel = audio.LogMel(8000, 20_000)
    assert torch.allclose(mel(x), torch.cat([mel(row[None]) for row in x]), atol=1e-4)


def test_features_start_at_unit_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    paths = [save(tmp_path / f"{i}.wav", sine(200 * (i + 1), 8000) + 0.01 * rng.normal(size=4000)) for i in range(8)]
    plan = audio.plan(paths)
    features = audio.Encoder(plan)(torch.from_numpy(np.stack([audio.decode(path, plan) for path in paths])))
    assert features.shape == (8, FEATURES)
    assert 0.3 < features.square().mean().sqrt() < 3


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        audio.decode(path, PLAN)
    assert caught.value.finding.where == str(path)
    assert caught.value.finding.remedy
    return caught.value.finding.kind


def test_bad_files_are_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.wav") == "missing file"
    assert refused(tmp_path) == "not a file"
    path = tmp_path / "Ünreadable.wav"
    path.write_bytes(b"")
    assert refused(path) == "empty file"
    path.write_bytes(b"a,b\n1,2\n")
    assert refused(path) == "undecodable sound"
    assert refused(save(path, np.zeros(0))) == "empty sound"
    for value in (np.nan, np.inf, -np.inf):
        assert refused(save(path, np.array([0.1, value, -value]), subtype="FLOAT")) == "undecodable sound"
    path.rename(tmp_path / "x.raw")  # by its content: the extension would ask libsndfile for a headerless file
    assert refused(tmp_path / "x.raw") == "undecodable sound"


def test_lying_headers(tmp_path: Path) -> None:
    path = save(tmp_path / "x.wav", sine(440, 8000))
    honest = audio.decode(path, PLAN)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 2**31 - 2)  # two gigabytes of samples
    path.write_bytes(content)
    assert (audio.decode(path, PLAN) == honest).all()
    content[24:28] = struct.pack("<I", 2**31 - 1)  # two thousand million samples a second
    path.write_bytes(content)
    assert refused(path) == "undecodable sound"


def test_no_more_is_read_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.wav", np.concatenate([sine(500, 8000), sine(900, 8000, level=0.9)]))
    monkeypatch.setattr(audio, "MAX_FRAMES", 4000)
    assert frequency(audio.decode(path, PLAN)) == pytest.approx(500, abs=3)


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.wav", sine(440, 8000))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"soundfile.*hesse\[train\]"):
        audio.decode(path, PLAN)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(
        [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("AU", "PCM_16")]
    ),
    keep=st.floats(0, 1),
    hits=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255))),
)
def test_damage_is_an_input_error_or_a_sound(
    tmp_path: Path, kind: tuple[str, str], keep: float, hits: list[tuple[int, int]]
) -> None:
    path = save(tmp_path / "damaged", sine(440, 8000, 0.05), format=kind[0], subtype=kind[1])
    content = bytearray(path.read_bytes())
    for place, value in hits:
        content[place % len(content)] = value
    path.write_bytes(content[: round(keep * len(content))])
    try:
        assert audio.decode(path, PLAN).shape == (4000,)
    except InputError as error:
        assert error.finding.where == str(path)
