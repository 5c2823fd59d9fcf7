"""Pretrained encoders, on tiny random checkpoints: what they compute, what is kept, what trains, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from PIL import Image
from pyarrow.csv import write_csv
from torch.nn import functional as F
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="pretrained encoders need transformers")

import hesse
from checkpoints import save_audio, save_image, save_text
from hesse import InputError
from hesse.cli import app as cli
from hesse.multimodal import Dataset, FusedModel, Schema, Table, encode, make_schema, read_table
from hesse.multimodal.encoders import pretrained
from hesse.multimodal.encoders.pretrained import cache, choices
from hesse.multimodal.encoders.pretrained.checkpoint import blocks_of, folder_of, identity_of, load, load_processor
from hesse.multimodal.encoders.pretrained.reading import PER_TOKEN, Reader
from hesse.multimodal.encoders.pretrained.tower import Tower
from hesse.optim import KFAC

N = 24
KINDS = {"photo": "image", "words": "text", "sound": "audio", "speech": "audio"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, pictures and sounds."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_image(folder / "photo")
    save_text(folder / "words")
    save_audio(folder / "sound")
    save_audio(folder / "speech", masked=True)
    rng = np.random.default_rng(0)
    for i in range(N):
        pixels = rng.integers(0, 100, (12 + i % 3, 14, 3)) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        wave = np.sin(np.arange(800 + 200 * (i % 3)) * (0.1 + 0.4 * (i % 2))) + 0.1 * rng.normal(
            size=800 + 200 * (i % 3)
        )
        soundfile.write(folder / f"{i}.wav", 0.4 * wave, 8000)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSE_CACHE", str(tmp_path / "cache"))


def words(i: int) -> str:
    return f"cat purrs {i}" if i % 2 else f"a dog {i} barks loudly at the door"


def table_of() -> Table:
    columns = {
        "photo": [f"{i}.png" if i % 7 else None for i in range(N)],
        "words": [words(i) if i % 9 else None for i in range(N)],
        "sound": [f"{i}.wav" if i % 5 else None for i in range(N)],
        "speech": [f"{i}.wav" for i in range(N)],
        "y": ["a", "b"] * (N // 2),
    }
    return read_table(pa.table(columns))


def prepared(data: Path, names: list[str], trainable: str | int = "none") -> tuple[Schema, Dataset]:
    table = table_of()
    others = {name: "ignore" for name in KINDS if name not in names}
    schema, _ = make_schema(
        table,
        "y",
        root=data,
        overrides=others,
        encoders={name: f"hf:{data / name}" for name in names},
        trainable=dict.fromkeys(names, trainable),
    )
    return schema, encode(schema, table, root=data)


def by_hand(folder: Path, kind: str, value: Any) -> torch.Tensor:
    """Pooled features of one value, as transformers' own page has it."""
    processor, model = load_processor(folder, kind), load(folder, kind)
    if kind == "image":
        made = processor(images=Image.open(value), return_tensors="pt")
    elif kind == "text":
        made = processor(value, return_tensors="pt")
    else:
        made = processor(soundfile.read(value)[0], sampling_rate=8000, return_tensors="pt")
    hidden = model(**made).last_hidden_state[0].detach()
    return hidden.mean(0) if kind == "audio" else torch.cat([hidden[0], hidden.mean(0)])


@pytest.mark.parametrize("name", KINDS)
def test_frozen_features_are_those_of_transformers(data: Path, name: str) -> None:
    schema, encoded = prepared(data, [name])
    key = f"{KINDS[name]}_{name}"
    features, present = encoded.inputs[key]
    cells = table_of().column(name).to_pylist()
    assert present.tolist() == [cell is not None for cell in cells]
    assert features.dtype == torch.float32
    for i in (1, 2, 8, 11):
        value = cells[i] if name == "words" else data / cells[i]
        assert torch.allclose(features[i], by_hand(data / name, KINDS[name], value), atol=1e-5)
    assert not features[~present].any()
    standard = (features[present] - torch.tensor(schema.columns[list(KINDS).index(name)].settings["center"])) / (
        torch.tensor(schema.columns[list(KINDS).index(name)].settings["spread"])
    )
    assert standard.std(0).median() == pytest.approx(1, abs=0.3)
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_trains_starts_with_the_features_of_a_frozen_one(data: Path, name: str) -> None:
    """Padding and masks must not show, where the model is told about them."""
    key = f"{KINDS[name]}_{name}"
    _, frozen = prepared(data, [name])
    schema, arrays = prepared(data, [name], "all")
    encoder = FusedModel(schema.model_settings(), 2).encoders[key]
    tower = encoder.get_submodule("tower")
    raw, present = arrays.inputs[key]
    assert raw.dtype == {"image": torch.uint8, "text": torch.int32, "audio": torch.float32}[KINDS[name]]
    pooled = tower(raw[present])
    features = frozen.inputs[key][0][present]
    full = ~raw[present].flatten(1).eq(0).all(1) if name != "sound" else raw[present][:, -1] != 0  # zeros are heard
    assert torch.allclose(pooled[full], features[full], atol=1e-4)
    assert full.sum() >= 5


def test_features_are_computed_once_and_kept_by_content(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = prepared(data, list(KINDS))
    entries = [path for path in (tmp_path / "cache" / "features").rglob("*") if path.is_file()]
    present = [encoded.sum() for _, encoded in first.inputs.values()]
    assert len(entries) == int(sum(present))

    computed: list[int] = []
    forward = Tower.forward
    monkeypatch.setattr(Tower, "forward", lambda self, x: (computed.append(len(x)), forward(self, x))[1])
    schema = make_schema(table_of(), "y", root=data, overrides=dict.fromkeys(["words", "sound", "speech"], "ignore"),
                         encoders={"photo": f"hf:{data / 'photo'}"})[0]  # fmt: skip
    computed.clear()
    again = encode(schema, table_of(), root=data)
    assert computed == []
    assert torch.equal(again.inputs["image_photo"][0], first.inputs["image_photo"][0])

    (data / "copy.png").write_bytes((data / "1.png").read_bytes())
    copied = encode(schema, read_table(pa.table({"photo": ["copy.png", "1.png"]})), root=data, with_target=False)
    assert computed == []
    assert torch.equal(*copied.inputs["image_photo"][0])


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["empty", "short", "bit"])
def test_a_damaged_entry_is_computed_anew(data: Path, tmp_path: Path, damage: bytes | None) -> None:
    schema, first = prepared(data, ["photo"])
    for path in (tmp_path / "cache" / "features").rglob("*"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[20] ^= 1
            path.write_bytes(bytes(content) if damage is None else damage)
    again = encode(schema, table_of(), root=data)
    assert torch.equal(again.inputs["image_photo"][0], first.inputs["image_photo"][0])


def test_where_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HESSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "hesse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "hesse"


def test_a_cache_that_cannot_be_written_is_named_and_done_without(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept = prepared(data, ["photo"])
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HESSE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"Features cannot be kept in .*file.*HESSE_CACHE") as told:
        _, found = prepared(data, ["photo"])
    assert len(told) == 1
    assert torch.equal(found.inputs["image_photo"][0], kept.inputs["image_photo"][0])


def test_progress_counts_every_value(data: Path) -> None:
    schema, _ = prepared(data, ["photo", "words"])
    there = sum(cell is not None for name in ("photo", "words") for cell in table_of().column(name).to_pylist())
    told: list[tuple[int, int]] = []
    for _ in range(2):  # computed, and from the disk
        encode(schema, table_of(), root=data, progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (there, there)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        told.clear()


@pytest.mark.parametrize("name", KINDS)
def test_the_last_blocks_train_and_the_rest_is_not_saved(data: Path, name: str) -> None:
    key = f"{KINDS[name]}_{name}"
    schema, encoded = prepared(data, [name], 2)
    model = FusedModel(schema.model_settings(), 2)
    encoder = model.encoders[key]
    blocks = blocks_of(encoder.get_submodule("tower.model"))
    assert len(blocks) == 3
    training = {id(p) for p in encoder.get_submodule("tower").parameters() if p.requires_grad}
    assert training == {id(p) for block in blocks[1:] for p in block.parameters()}

    state = model.state_dict()
    saved = [n for n in state if ".tower." in n]
    assert len(saved) == len(training)
    inputs, _ = encoded.batch(slice(0, 8))
    again = FusedModel(schema.model_settings(), 2)
    assert not torch.equal(again(**inputs), model(**inputs))
    again.load_state_dict(state)
    assert torch.equal(again(**inputs), model(**inputs))
    assert torch.equal(model(**model.prepare(inputs)), model(**inputs))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({n: t for n, t in state.items() if n != saved[0]})


@pytest.mark.parametrize("trainable", ["none", 1, "all"])
def test_kfac_trains_them_and_their_gradients_are_right(data: Path, trainable: str | int) -> None:
    torch.manual_seed(0)
    schema, encoded = prepared(data, ["photo", "words"], trainable)
    model = FusedModel(schema.model_settings(), 2)
    batch = encoded.batch(slice(0, N))
    assert hesse.check.gradients(hesse.closure(model, F.cross_entropy, batch)).ok
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = KFAC(model)
    losses = [float(optimizer.step(hesse.closure(model, F.cross_entropy, batch))) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    moved = [name for name, p in before.items() if not torch.equal(now[name], p)]
    assert len(moved) > 0.8 * len(before)
    assert any("image_photo.tower" in name for name in moved) == (trainable != "none")
    assert any("text_words.tower" in name for name in moved) == (trainable != "none")


def test_what_the_features_do_not_depend_on_does_not_train(data: Path) -> None:
    schema, encoded = prepared(data, ["words"], "all")
    assert schema.columns[1].settings["unused"] == ["pooler.dense.weight", "pooler.dense.bias"]
    model = FusedModel(schema.model_settings(), 2)
    inputs, _ = encoded.batch(slice(0, 8))
    model(**inputs).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any("pooler" in name for name in model.state_dict())


def test_dropout_stays_off(data: Path) -> None:
    schema, encoded = prepared(data, ["words"], "all")
    model = FusedModel(schema.model_settings(), 2).train()
    inputs, _ = encoded.batch(slice(0, 8))
    assert torch.equal(model(**inputs), model(**inputs))
    assert model.training


def test_of_a_long_text_no_more_is_tokenised_than_can_matter() -> None:
    seen: list[int] = []

    class Processor:
        model_max_length = 64

        def __call__(self, start: str, **_: Any) -> dict[str, list[int]]:
            seen.append(len(start))
            return {"input_ids": [1]}

    Reader("text", Path(), 1.0, Processor())("x" * 1_000_000)
    assert seen == [PER_TOKEN * 64]


def test_a_text_of_a_million_characters_and_one_without_tokens(data: Path) -> None:
    schema, _ = prepared(data, ["words"])
    table = read_table(pa.table({"words": ["cat " * 250_000, "cat " * 2_000, "\u200b"]}))
    features, _ = encode(schema, table, root=data, with_target=False).inputs["text_words"]
    assert features.isfinite().all()
    assert torch.equal(features[0], features[1])


@pytest.mark.parametrize("trainable", ["none", 1])
def test_sequences_of_pictures(data: Path, trainable: str | int) -> None:
    """Each picture has the features it has alone, and what is behind the last does not matter."""
    photos = [[f"{(i + k) % N}.png" for k in range(i % 4)] for i in range(N)]
    table = read_table(pa.table({"photos": photos, "y": ["a", "b"] * (N // 2)}))
    choice: dict[str, Any] = {"encoders": {"photos": f"hf:{data / 'photo'}"}, "trainable": {"photos": trainable}}
    schema, _ = make_schema(table, "y", root=data, **choice)
    told: list[tuple[int, int]] = []
    encoded = encode(schema, table, root=data, progress=lambda done, total: told.append((done, total)))
    (pictures, counts), present = encoded.inputs["images_photos"]
    assert pictures.shape[:2] == (N, 3)
    assert counts.tolist() == [i % 4 for i in range(N)]
    assert present.tolist() == [i % 4 > 0 for i in range(N)]
    assert told[-1] == (sum(map(len, photos)), sum(map(len, photos)))
    if trainable == "none":
        for i, k in ((1, 0), (3, 2), (22, 1)):
            assert torch.allclose(pictures[i, k], by_hand(data / "photo", "image", data / photos[i][k]), atol=1e-5)
    model = FusedModel(schema.model_settings(), 2)
    inputs, targets = encoded.batch(slice(0, N))
    assert torch.equal(model(**model.prepare(inputs)), model(**inputs))
    outputs = model(**inputs)
    spoilt = pictures.clone()
    for i in range(N):
        spoilt[i, i % 4 :] = 7
    assert torch.allclose(model(images_photos=((spoilt, counts), present)), outputs, atol=1e-6)
    again = FusedModel(schema.model_settings(), 2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs), outputs)
    optimizer = KFAC(model)
    losses = [float(optimizer.step(hesse.closure(model, F.cross_entropy, (inputs, targets)))) for _ in range(4)]
    assert losses[-1] < losses[0]
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    new = read_table(pa.table({"photos": ["1.png|2.png", "1.png|broken.png", None]}))
    with pytest.raises(InputError, match=r"undecodable image at data frame, row 2, column 'photos'"):
        encode(schema, new, root=data, with_target=False)


def test_files_that_cannot_be_read_cost_their_rows(data: Path) -> None:
    for trainable in ("none", 1):
        schema, _ = prepared(data, ["photo"], trainable)
        (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        table = read_table(pa.table({"photo": ["1.png", "broken.png", "gone.png", "2.png"]}))
        with pytest.raises(InputError, match=r"undecodable image at data frame, row 2, column 'photo' \(broken.png\)"):
            encode(schema, table, root=data, with_target=False)
        rows = encode(schema, table, root=data, with_target=False, skip_bad_rows=True).rows
        assert rows.tolist() == [0, 3]


@pytest.mark.parametrize("name", ["photo", "sound"])
@pytest.mark.parametrize("trainable", ["none", 1])
def test_where_no_file_can_be_read_the_first_is_named(
    tmp_path: Path, data: Path, name: str, trainable: str | int
) -> None:
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        (tmp_path / f"{i}.wav").write_bytes(b"RIFF broken")
    table, folder = table_of(), data / name
    others = dict.fromkeys([other for other in KINDS if other != name], "ignore")
    with pytest.raises(InputError, match=rf"undecodable (image|sound) at data frame, column '{name}'"):
        make_schema(
            table, "y", root=tmp_path, overrides=others, encoders={name: f"hf:{folder}"}, trainable={name: trainable}
        )


# ---------------------------------------------------------------- what is refused


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def custom(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model", "AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")


def halved(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "layer.1." not in n}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("preprocessor_config.json"), "no processor.*preprocessor_config.json"),
        (remove("config.json"), "no checkpoint.*no config.json"),
        (remove("model.safetensors"), "no weights.*safetensors"),
        (pickled, "no weights.*pickled ones are not loaded"),
        (custom, "unusable checkpoint"),
        (halved, r"incomplete checkpoint.*lacks 16 weights of a vit model, the first 'layers.1"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "unusable checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "unusable checkpoint|no processor"),
    ],
    ids=["processor", "config", "weights", "pickle", "code", "half", "damaged", "json"],
)
def test_spoilt_checkpoints_are_named(
    tmp_path: Path, data: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = save_image(tmp_path / "vit")
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        make_schema(table_of(), "y", root=data, encoders={"photo": f"hf:{folder}"})
    assert "column 'photo'" in caught.value.finding.where
    assert str(folder) in caught.value.finding.where


@pytest.mark.parametrize(
    ("encoders", "trainable", "message"),
    [
        ({"photo": "words"}, {}, "no processor|model of another modality"),
        ({"words": "photo"}, {}, "no processor|model of another modality"),
        ({"sound": "words"}, {}, "no processor|model of another modality"),
        ({"photo": "nowhere"}, {}, "no such checkpoint.*There is no such folder"),
        ({"y": "photo"}, {}, "wrong kind.*column 'y'.*target"),
        ({"phot": "photo"}, {}, "no column 'phot'.*Did you mean 'photo'"),
        ({"photo": "photo"}, {"photo": 4}, "too many blocks.*3 blocks; 4"),
        ({"photo": "photo"}, {"photo": "some"}, "'some' does not say how much"),
        ({"photo": "photo"}, {"photo": -1}, "'-1' does not say how much"),
        ({"photo": "photo"}, {"words": 1}, "no such encoder.*column 'words'"),
    ],
)
def test_choices_that_do_not_fit(data: Path, encoders: Any, trainable: Any, message: str) -> None:
    folders = {name: f"hf:{data / folder}" for name, folder in encoders.items()}
    with pytest.raises(InputError, match=message):
        make_schema(table_of(), "y", root=data, encoders=folders, trainable=trainable)


@pytest.mark.parametrize(("kind", "folder"), [("image", "words"), ("text", "photo"), ("audio", "photo")])
def test_a_model_of_another_modality_is_named(data: Path, kind: str, folder: str) -> None:
    with pytest.raises(InputError, match=rf"model of another modality.*reads {KINDS[folder]}; the column holds {kind}"):
        load(data / folder, kind)


def test_what_an_encoder_may_be_called(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    assert choices({"a": "hf:x"}, {"a": "all"})["a"].trainable == "all"
    for wrong in ("vit", "hf:", "torch:vit"):
        with pytest.raises(InputError, match=r"unknown encoder.*hf:google"):
            choices({"a": wrong}, {})
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options.get("local_files_only", False)))
        if not options.get("local_files_only"):
            raise ConnectionError("no route to the hub")
        raise OSError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match=r"no such checkpoint at some/name.*no route to the hub"):
        folder_of("some/name")
    assert asked == [("some/name", True), ("some/name", False)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(data / "photo"))
    assert folder_of("some/name") == data / "photo"
    for path in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"):
        with pytest.raises(InputError, match="There is no such folder"):
            folder_of(path)


def test_categories_with_an_encoder_are_texts_and_numbers_have_none(data: Path) -> None:
    table = read_table(pa.table({"size": ["small", "large"] * 12, "w": np.arange(24) / 7, "y": ["a", "b"] * 12}))
    schema, _ = make_schema(table, "y", root=data, encoders={"size": f"hf:{data / 'words'}"})
    assert (schema.columns[0].kind, schema.columns[0].reason) == ("text", "texts, read by words (frozen)")
    with pytest.raises(InputError, match=r"wrong kind.*column 'w'.*its kind is number"):
        make_schema(table, "y", root=data, encoders={"w": f"hf:{data / 'words'}"})


# ---------------------------------------------------------------- the whole job


def test_a_run_with_pretrained_encoders(tmp_path: Path, data: Path) -> None:
    vit = save_image(tmp_path / "vit")
    table = table_of().data
    run = hesse.train(
        table,
        "y",
        out=tmp_path / "run",
        data_root=data,
        encoders={"photo": f"hf:{vit}", "words": f"hf:{data / 'words'}"},
        trainable={"photo": 1},
        columns={"sound": "ignore", "speech": "ignore"},
        epochs=2,
        verbose=False,
    )
    assert f"--encoder photo=hf:{vit}" in run.config["command"]
    assert "--trainable photo=1" in run.config["command"]
    predicted = run.predict(table, data_root=data)
    assert predicted["y"].null_count == 0
    names = list(run.model().state_dict())
    assert any("encoders.image_photo.tower.model.layers.2" in name for name in names)
    assert not any("layers.0" in name or "text_words.tower" in name for name in names)
    settings = {column.name: column.settings for column in run.schema.columns}
    assert settings["photo"]["source"] == str(vit)
    assert settings["photo"]["identity"] == identity_of(vit)

    again = hesse.Run(tmp_path / "run").predict(table, data_root=data)
    assert again.equals(predicted)
    save_image(vit, seed=1)
    with pytest.raises(InputError, match=rf"changed checkpoint at {vit}.*Put the checkpoint back"):
        hesse.Run(tmp_path / "run").predict(table, data_root=data)
    vit.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=rf"no such checkpoint at {vit}.*read from there.*or a link to it"):
        hesse.Run(tmp_path / "run").predict(table, data_root=data)


def test_the_command_line_takes_encoders(tmp_path: Path, data: Path) -> None:
    write_csv(table_of().data.select(["photo", "y"]), data / "table.csv")
    words = ["train", str(data / "table.csv"), "--target", "y", "--out", str(tmp_path / "run"), "--epochs", "1", "-q"]
    result = CliRunner().invoke(
        cli.app, [*words, "--encoder", f"photo=hf:{data / 'photo'}", "--trainable", "photo=none"]
    )
    assert result.exit_code == 0, result.output
    assert hesse.Run(tmp_path / "run").schema.model_settings()["image_photo"]["kind"] == "features"
    result = CliRunner().invoke(cli.app, [*words, "--encoder", "photo"])
    assert result.exit_code == 2
    assert "NAME=hf:PATH" in result.output


def test_settings_are_json(data: Path) -> None:
    schema, _ = prepared(data, list(KINDS), 1)
    assert Schema.from_json(json.loads(json.dumps(schema.to_json(), allow_nan=False))) == schema
    assert pretrained.storage(schema.columns[0].settings, "image") == ((3, 16, 16), np.dtype(np.uint8))
