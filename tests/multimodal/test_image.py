"""Images: every mode and depth, orientation, planning, and what damaged or malicious files get."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hesse.finding import InputError
from hesse.multimodal.encoders import FEATURES, image

GREY = {"height": 8, "width": 8, "channels": 1, "white": 65535.0, "mean": [0.0], "std": [1.0]}
COLOUR = {**GREY, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_pixels_of_the_planned_size_come_back_unchanged(tmp_path: Path) -> None:
    grey, colour = noise(8, 8), noise(8, 8, 3)
    assert (image.decode(save(tmp_path / "g.png", grey), GREY) == grey[None]).all()
    assert (image.decode(save(tmp_path / "c.png", colour), COLOUR) == colour.transpose(2, 0, 1)).all()


def test_sixteen_bit_grey_equals_the_same_picture_in_eight(tmp_path: Path) -> None:
    grey = noise(8, 8)
    deep = grey.astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        assert (image.decode(save(tmp_path / name, deep), GREY) == grey[None]).all()


@pytest.mark.parametrize("white", [1.0, 255.0, 4095.0, 65535.0])
def test_white_of_deep_pictures_is_found_in_the_training_images(tmp_path: Path, white: float) -> None:
    ramp = np.linspace(0, white, 64, dtype=np.float32).reshape(8, 8)
    path = save(tmp_path / "ramp.tif", ramp if white == 1.0 else ramp.astype(np.uint16))
    plan = image.plan([path])
    assert plan["white"] == white
    expected = np.rint(255 * np.asarray(Image.open(path), np.float64) / white)
    assert np.abs(image.decode(path, plan)[0] - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_every_mode_gives_every_number_of_channels(tmp_path: Path, mode: str) -> None:
    source = Image.new("L", (9, 7), 200) if mode.startswith("I;") else Image.new("RGB", (9, 7), "white")
    path = save(tmp_path / "x.tif", source.convert("P").convert(mode) if mode == "PA" else source.convert(mode))
    for channels in (1, 3, 4):
        plan = {**GREY, "channels": channels, "white": 255.0, "mean": [0.0] * channels}
        data = image.decode(path, plan)
        assert (data.shape, data.dtype) == image.storage(plan)
        assert data[:, 4, 4].tolist() == [200 if mode.startswith("I;") else 255] * min(channels, 3) + [255] * (
            channels == 4
        )


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    colour = Image.fromarray(np.repeat(np.repeat(noise(2, 2, 3), 4, 0), 4, 1))
    path = save(tmp_path / "p.png", colour.quantize(4))
    assert np.abs(image.decode(path, COLOUR).transpose(1, 2, 0) - np.asarray(colour, int)).max() <= 8


def test_transparency_is_planned_kept_and_hides_what_is_under_it(tmp_path: Path) -> None:
    pixels = noise(8, 8, 4)
    pixels[..., 3] = np.where(np.arange(8) < 4, 255, 0)
    other = pixels.copy()
    other[:, 4:, :3] = 255 - other[:, 4:, :3]
    paths = [save(tmp_path / f"{i}.png", p) for i, p in enumerate((pixels, other))]
    plan = image.plan(paths)
    assert plan["channels"] == 4
    first, second = (image.decode(path, plan) for path in paths)
    assert (first == second).all()
    assert (first[:3, :, :4] == pixels[:, :4, :3].transpose(2, 0, 1)).all()
    assert (image.decode(paths[0], COLOUR)[:, :, 4:] == 255).all()  # no fourth channel: on white


def test_grey_stored_as_opaque_colour_is_planned_grey(tmp_path: Path) -> None:
    pixels = np.repeat(noise(8, 8, 1), 4, axis=2)
    pixels[..., 3] = 255
    assert image.plan([save(tmp_path / "x.png", pixels)])["channels"] == 1
    pixels[0, 0] = (255, 0, 0, 255)
    assert image.plan([save(tmp_path / "x.png", pixels)])["channels"] == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jpg"])
def test_orientation_is_undone_once(tmp_path: Path, orientation: int, name: str) -> None:
    upright = np.zeros((40, 24), np.uint8)
    upright[:20, :12] = 255  # bright in the upper left corner
    turns = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose}
    turns |= {6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}
    stored = np.ascontiguousarray(turns.get(orientation, lambda a: a)(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / name, stored, exif=exif)
    plan = image.plan([path])
    assert (plan["height"], plan["width"]) == (40, 24)
    data = image.decode(path, plan)[0]
    assert data[:18, :10].min() > 240
    assert max(data[22:].max(), data[:, 14:].max()) < 15


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (40, 200)]
    path = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (image.decode(path, GREY) == 40).all()


def test_aspect_is_kept_and_the_padding_is_the_mean(tmp_path: Path) -> None:
    path = save(tmp_path / "wide.png", np.full((10, 20), 250, np.uint8))
    data = image.decode(path, {**GREY, "mean": [99.6]})[0]
    assert (data[2:6] == 250).all()
    assert (data[:2] == 100).all() and (data[6:] == 100).all()


def test_extreme_shapes(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", noise(*size)) for i, size in enumerate([(1, 1), (1, 3000), (3000, 1)])]
    plan = image.plan(paths)
    for path in paths:
        assert image.decode(path, plan).shape == (1, plan["height"], plan["width"])


def test_a_plan_is_json_and_standardises(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"画像{i}.png", noise(100, 200, 3)) for i in range(5)]
    plan = image.plan(paths)
    assert json.loads(json.dumps(plan)) == plan
    assert (plan["height"], plan["width"], plan["channels"]) == (32, 64, 3)
    x = np.stack([image.decode(path, plan) for path in paths]).astype(float)
    assert np.allclose(x.mean((0, 2, 3)), plan["mean"], atol=1)
    assert np.allclose(x.std((0, 2, 3)), plan["std"], rtol=0.05)


def test_a_plan_passes_over_what_cannot_be_read_but_needs_something(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "good.png", noise(9, 9)), tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    assert image.plan([bad, good, bad])["height"] == 9
    with pytest.raises(InputError, match=r"bad\.png"):
        image.plan([bad, bad])
    with pytest.raises(InputError, match="no training value"):
        image.plan([])


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 13_000, 60_000])  # within Pillow's limits, in its warning range, beyond
def test_bombs_are_refused_by_their_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only_png(side, side))
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with pytest.raises(InputError) as caught:
        image.decode(path, GREY)
    assert caught.value.finding.kind == "decompression bomb"
    assert caught.value.finding.where == str(path)
    assert limit == Image.MAX_IMAGE_PIXELS and filters == list(warnings.filters)


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only_png(10_000, 10_000))  # Pillow would warn, and here warnings are errors
    good = save(tmp_path / "good.png", noise(200, 200))
    filters = list(warnings.filters)

    def read(i: int) -> str:
        try:
            return str(image.decode(path if i % 2 else good, GREY).shape)
        except InputError as error:
            return error.finding.kind

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(100))) == ["(1, 8, 8)", "decompression bomb"] * 50
    assert filters == list(warnings.filters)


def test_the_limit_does_not_depend_on_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only_png(60_000, 60_000))
    with pytest.raises(InputError, match="60000 x 60000"):
        image.decode(path, GREY)


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(20, 20, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("empty file", b""),
        ("undecodable image", b"x,y\n1,2\n"),
        ("undecodable image", png()[:-300]),  # cut short
        ("undecodable image", png()[:40]),
        (
            "undecodable image",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ),  # a program, not a picture
    ],
)
def test_what_is_not_a_whole_picture_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "Größe.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        image.decode(path, GREY)
    assert caught.value.finding.kind == kind
    assert caught.value.finding.where == str(path)
    assert caught.value.finding.remedy
    assert "<" not in caught.value.finding.message  # no object of Python's


def test_missing_files_folders_and_impossible_names(tmp_path: Path) -> None:
    for path, kind in [
        (tmp_path / "absent.png", "missing file"),
        (tmp_path, "not a file"),
        (tmp_path / ("x" * 400), "unreadable file"),
    ]:
        with pytest.raises(InputError) as caught:
            image.decode(path, GREY)
        assert caught.value.finding.kind == kind


def test_pixels_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finite"):
        image.decode(save(tmp_path / "nan.tif", np.full((8, 8), np.nan, np.float32)), GREY)


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "DDS", "SGI", "QOI"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(FORMATS),
    keep=st.floats(0, 1),
    hits=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255))),
)
def test_damage_is_an_input_error_or_a_picture(
    tmp_path: Path, kind: str, keep: float, hits: list[tuple[int, int]]
) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3)).save(stream, kind)
    content = bytearray(stream.getvalue())
    for place, value in hits:
        content[place % len(content)] = value
    path = tmp_path / "damaged"
    path.write_bytes(content[: round(keep * len(content))])
    try:
        assert image.decode(path, COLOUR).shape == (3, 8, 8)
    except InputError as error:
        assert error.finding.where == str(path)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (4, 64, 64), (1, 8, 64), (3, 17, 41)])
def test_features_start_at_unit_scale(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    channels, height, width = shape
    plan = {
        "height": height,
        "width": width,
        "channels": channels,
        "mean": [127.5] * channels,
        "std": [73.9] * channels,
    }
    encoder = image.Encoder(plan)
    features = encoder(torch.randint(0, 256, (64, *shape), dtype=torch.uint8))
    assert features.shape == (64, FEATURES)
    assert 0.3 < features.square().mean().sqrt() < 3
    assert encoder.features.in_features <= 1024
