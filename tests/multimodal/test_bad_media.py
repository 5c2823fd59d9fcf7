"""Media that are not what their column holds, or more than anyone needs: named, or read within bounds."""

from __future__ import annotations

import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from PIL import Image

from hesse import InputError
from hesse.multimodal import Schema, Table, encode, make_schema, read_table
from hesse.multimodal.encoders import audio, image, text
from hesse.multimodal.inputs import unknown
from hesse.multimodal.sniff import kind_of

N = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(N):
        Image.new("L", (9, 8), 8 * i).save(tmp_path / f"{i}.png")
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(400) * (0.1 + 0.01 * i)), 8000)
    return tmp_path


def table_of(**columns: Any) -> Table:
    return read_table(pa.table(columns))


def trained(folder: Path) -> Schema:
    return make_schema(pets(), "y", root=folder)[0]


def pets(photo: str = "png", sound: str = "wav") -> Table:
    return table_of(
        photo=[f"{i}.{photo}" for i in range(N)], sound=[f"{i}.{sound}" for i in range(N)], y=["a", "b"] * (N // 2)
    )


# ---------------------------------------------------------------- the wrong files


def test_a_sound_among_pictures_is_named_with_its_row(folder: Path) -> None:
    (folder / "17.png").write_bytes((folder / "17.wav").read_bytes())
    (folder / "20.wav").write_bytes((folder / "20.png").read_bytes())
    schema = trained(folder)
    with pytest.raises(InputError) as caught:
        encode(schema, pets(), root=folder)
    assert caught.value.finding.where == "data frame, row 18, column 'photo' (17.png)"
    assert "The column holds pictures, and this is a sound (WAV)." in str(caught.value)
    data = encode(schema, pets(), root=folder, skip_bad_rows=True)
    assert len(data) == N - 2
    assert "holds sounds, and this is a picture (PNG)" in data.findings[2].message


def test_columns_exchanged_at_prediction_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"exchanged columns at data frame, columns 'photo' and 'sound'") as caught:
        encode(trained(folder), pets("wav", "png"), root=folder, with_target=False, skip_bad_rows=True)
    assert "'photo' held pictures in training and now holds sounds" in str(caught.value)


def test_one_column_of_other_files_is_named_by_its_first_row(folder: Path) -> None:
    with pytest.raises(InputError, match=r"row 1, column 'photo' \(0.wav\).*this is a sound \(WAV\).*29 of the other"):
        encode(trained(folder), pets("wav"), root=folder, with_target=False)


def test_an_address_is_not_fetched(folder: Path) -> None:
    photo = [f"{i}.png" for i in range(N - 1)] + ["https://example.org/29.png"]
    table = table_of(photo=photo, x=[i % 7 / 3 for i in range(N)], y=["a", "b"] * (N // 2))
    with pytest.raises(InputError, match=r"row 30, column 'photo' \(https://example.org/29.png\): This is an address"):
        encode(make_schema(table, "y", root=folder)[0], table, root=folder)


@pytest.mark.parametrize("many", [8, 15, 20])
def test_columns_exchanged_in_some_rows_are_named(folder: Path, many: int) -> None:
    photo, sound = ([f"{i}.{end if i >= many else other}" for i in range(N)] for end, other in EXCHANGED)
    table = table_of(photo=photo, sound=sound, y=["a", "b"] * (N // 2))
    with pytest.raises(InputError, match=r"mixed column at data frame, row \d+, column 'photo'") as caught:
        make_schema(table, "y", root=folder)
    images, sounds = N - many, many
    more, less = ("image", "audio") if images > sounds else ("audio", "image")
    assert f"{max(images, sounds)} values are paths of {more} files and {min(images, sounds)} of {less}" in str(
        caught.value
    )
    assert "exchanged with another column" in str(caught.value)
    schema, _ = make_schema(table, "y", root=folder, overrides={"photo": "ignore", "sound": "text"})
    assert [c.kind for c in schema.inputs] == ["text"]


EXCHANGED = (("png", "wav"), ("wav", "png"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_formats_of_pictures_are_told_by_their_content(tmp_path: Path, form: str) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "x", form)
    assert kind_of(tmp_path / "x")[0] == ("" if form == "PPM" else "image")


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"])
def test_formats_of_sounds_are_told_by_their_content(tmp_path: Path, form: str) -> None:
    soundfile.write(tmp_path / "x", np.zeros(4000), 8000, format=form)
    assert kind_of(tmp_path / "x")[0] == "audio"


# ---------------------------------------------------------------- pictures


def test_animations_are_read_by_their_first_frame_and_noted(folder: Path) -> None:
    frames = [Image.new("L", (9, 8), v) for v in (200, 10, 90)]
    for i in range(N):
        frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:])
    schema, _ = make_schema(pets("gif"), "y", root=folder)
    assert schema.columns[0].reason == "paths of image files, animated ones by their first frame"
    assert "animated" not in schema.columns[0].settings
    pixels, _ = encode(schema, pets("gif"), root=folder).inputs["image_photo"]
    assert set(pixels.flatten().tolist()) == {200}
    assert trained(folder).columns[0].reason == "paths of image files"


def test_colours_of_print_are_those_of_the_screen(tmp_path: Path) -> None:
    """Cyan ink takes red away; a JPEG of Adobe's stores the complements, which must not show."""
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "x.tif")
    cyan.save(tmp_path / "x.jpg", quality=95)
    shape = {"height": 16, "width": 16, "channels": 3, "mean": [0.0] * 3, "white": 255.0}
    for name in ("x.tif", "x.jpg"):
        red, green, blue = image.decode(tmp_path / name, shape).astype(int).mean((1, 2))
        assert red < 10 < 245 < min(green, blue)


def test_sixteen_bits_are_scaled_and_not_cut_off(folder: Path) -> None:
    for i in range(N):
        ramp = np.linspace(0, 65535, 72).reshape(8, 9).astype(np.uint16)
        Image.fromarray(ramp).save(folder / f"{i}.png")
    schema = trained(folder)
    pixels, _ = encode(schema, pets(), root=folder).inputs["image_photo"]
    expected = np.rint(np.linspace(0, 255, 72)).reshape(8, 9)
    assert np.abs(pixels[0, 0].numpy() - expected).max() <= 1


# ---------------------------------------------------------------- too much


def hour(path: Path, loud: int, rate: int = 8000) -> None:
    """An hour of silence with half a second of sound, as a sparse file."""
    seconds = 3600
    soundfile.write(path, np.zeros(1), rate, subtype="PCM_16")
    size = 2 * rate * seconds
    with path.open("r+b") as file:
        header = bytearray(file.read(44))
        header[4:8] = (36 + size).to_bytes(4, "little")
        header[40:44] = size.to_bytes(4, "little")
        file.seek(0)
        file.write(header)
        file.truncate(44 + size)
        wave = (20_000 * np.sin(np.arange(rate // 2) * 2 * np.pi * 440 / rate)).astype("<i2")
        file.seek(44 + 2 * loud)
        file.write(wave.tobytes())


def test_an_hour_of_sound_is_read_within_bounds(folder: Path) -> None:
    loud = 8000 * 600 + 123
    hour(folder / "0.wav", loud)
    assert soundfile.info(folder / "0.wav").duration == 3600
    schema = trained(folder)
    assert schema.columns[1].settings["samples"] == 400
    assert schema.columns[1].reason == "paths of audio files, of longer ones the loudest 0.05 s"
    tracemalloc.start()
    sounds, _ = encode(schema, pets(), root=folder).inputs["audio_sound"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120e6  # of samples alone the hour has 230 MB
    assert sounds[0].abs().max() == 32767  # where something is heard


def test_the_loudest_stretch_of_a_long_file_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    wave = (
        rng.normal(size=(200_003, 2)) * (0.05 + 0.3 * np.exp(-(((np.arange(200_003) - 140_000) / 4000) ** 2)))[:, None]
    )
    soundfile.write(tmp_path / "x.flac", wave, 8000)
    settings = {"rate": 4000, "samples": 3000}
    whole = audio.decode(tmp_path / "x.flac", settings)
    monkeypatch.setattr(audio, "HELD", 10_000)
    assert np.array_equal(audio.decode(tmp_path / "x.flac", settings), whole)
    stretch, rate = audio.stretch(tmp_path / "x.flac", 1.0)
    assert (len(stretch), rate) == (8000, 8000)


def test_of_a_text_of_a_million_characters_only_the_beginning_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = [f"story {i} " * (150_000 if i in (3, 17) else 3) for i in range(N)]
    assert len(stories[17]) > 1_000_000
    seen: list[int] = []
    normalize = unicodedata.normalize
    monkeypatch.setattr(unicodedata, "normalize", lambda form, s: seen.append(len(s)) or normalize(form, s))
    table = table_of(story=stories, y=["a", "b"] * (N // 2))
    schema, _ = make_schema(table, "y", root=folder)
    codes, _ = encode(schema, table, root=folder).inputs["text_story"]
    assert seen and max(seen) <= 4 * text.LONGEST
    assert "of longer ones the first 256 characters" in schema.columns[0].reason
    assert codes.shape == (N, text.LONGEST)
    assert len(schema.columns[0].example) <= 60


def test_ten_thousand_categories_share_a_table_of_a_thousand() -> None:
    rng = np.random.default_rng(0)
    names = [f"town {i}" for i in np.concatenate([np.arange(10_000), rng.geometric(1e-3, 50_000) % 10_000])]
    table = table_of(town=names, y=rng.choice(["a", "b"], len(names)).tolist())
    schema, _ = make_schema(table, "y", root=Path())
    assert schema.columns[0].kind == "category"
    assert schema.model_settings()["columns"]["categories"] == [1001]
    (_, codes), present = encode(schema, table, root=Path()).inputs["columns"]
    assert present.all()
    assert codes.unique().tolist() == list(range(1, 1001))
    assert unknown(schema, table_of(town=["no such town"])) == []


# ---------------------------------------------------------------- what is new at prediction


def test_unknown_categories_are_counted_by_column_and_value() -> None:
    table = table_of(size=["S", "M", "L"] * 10, colour=["red", "blue"] * 15, y=["a", "b"] * 15)
    schema, _ = make_schema(table, "y", root=Path())
    new = table_of(size=["S", "XL", "XXL", "XL", None], colour=["red"] * 5)
    (finding,) = unknown(schema, new)
    assert (finding.kind, finding.where, finding.value) == ("unknown categories", "data frame, row 2, column 'size'", 3)
    assert finding.message == "3 of 5 values were in no training row and count as missing: 'XL' (2), 'XXL' (1)."
    assert finding.evidence == {"values": {"XL": 2, "XXL": 1}}
    assert unknown(schema, table_of(colour=["red"])) == []
    (_, codes), _ = encode(schema, new, root=Path(), with_target=False).inputs["columns"]
    assert codes[:, 0].tolist() == [codes[0, 0].item(), 0, 0, 0, 0]


def test_a_modality_that_is_not_there_at_prediction_is_missing_and_named(folder: Path) -> None:
    schema = trained(folder)
    data = encode(schema, table_of(photo=["1.png", None]), root=folder, with_target=False)
    assert [(f.kind, f.where, f.severity) for f in data.findings] == [
        ("missing column", "data frame, column 'sound'", "warning")
    ]
    sounds, present = data.inputs["audio_sound"]
    assert not present.any()
    assert not torch.count_nonzero(sounds)
    with pytest.raises(InputError, match="lacks 'photo', 'sound', which the model was trained with"):
        encode(schema, table_of(foto=["1.png"]), root=folder, with_target=False)
