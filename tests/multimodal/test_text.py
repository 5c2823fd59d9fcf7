"""Text: normalisation, alphabets, codes, and features that know nothing of padding."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hesse.finding import InputError
from hesse.multimodal.encoders import FEATURES, text

TEXTS = [
    "zwölf",
    "zwo\u0308lf",
    "двенадцать",
    "двенадцать!",
    "十二",
    "十二。",
    "اثنا عشر",
    "अठारह",
    "👩‍🔬👩‍🔬",
    "",
]


def test_what_looks_equal_is_coded_equal() -> None:
    plan = text.plan(TEXTS)
    for one, other in [("zwölf", "zwo\u0308lf"), ("ﬁx", "fix"), ("Ｆ５", "F5"), ("ｶﾞ", "ガ")]:
        assert (text.decode(one, plan) == text.decode(other, plan)).all()
    assert text.normalise("Polish") != text.normalise("polish")


def test_codes_spell_the_text() -> None:
    plan = text.plan(TEXTS)
    assert json.loads(json.dumps(plan)) == plan
    for value in TEXTS:
        data = text.decode(value, plan)
        assert (data.shape, data.dtype) == text.storage(plan)
        written = unicodedata.normalize("NFKC", value)
        spelled = [plan["alphabet"][code - 2] if code > 1 else None for code in data if code != text.PADDING]
        assert spelled == [c if c in plan["alphabet"] else None for c in written]


def test_characters_of_a_single_text_train_the_unknown_code() -> None:
    plan = text.plan(["aab", "ac", "add"])
    assert plan["alphabet"] == "a"
    assert text.decode("cab", plan).tolist() == [text.UNKNOWN, 2, text.UNKNOWN]


def test_a_plan_does_not_depend_on_the_hash_seed() -> None:
    assert text.plan(["cab", "abc"])["alphabet"] == text.plan(["bca", "abc"])["alphabet"] == "abc"


def test_limits() -> None:
    plan = text.plan(["長" * 100_000] * 2)
    note = "of longer ones the first 256 characters"
    assert plan == {"length": text.LONGEST, "alphabet": "長", "note": note}
    assert (text.decode("長" * 100_000, plan) == 2).all()
    assert text.plan([""]) == {"length": 1, "alphabet": ""}
    many = "".join(chr(0x4E00 + i) for i in range(250))
    assert len(text.plan([many, many])["alphabet"]) == 250
    with pytest.raises(InputError):
        text.plan([])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(), max_size=40), min_size=1, max_size=5),
    st.text(st.characters(), max_size=40),
)
def test_any_string_has_finite_features(training: list[str], value: str) -> None:
    plan = text.plan(training)
    json.dumps(plan, ensure_ascii=False).encode()  # no lone surrogate in the plan
    data = text.decode(value, plan)
    assert data.max() < 2 + len(plan["alphabet"])
    assert text.Encoder(plan)(torch.from_numpy(data)[None]).isfinite().all()


def test_features_do_not_depend_on_padding_nor_on_neighbours() -> None:
    torch.manual_seed(0)
    encoder = text.Encoder({"length": 12, "alphabet": "abcdef"}).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too: they would leak into the padding
    words = [torch.randint(1, 8, (n,)) for n in (1, 3, 7, 12)]
    batch = torch.stack([torch.nn.functional.pad(word, (0, 12 - len(word))) for word in words])
    alone = torch.cat([encoder(word[None]) for word in words])
    assert torch.allclose(encoder(batch), alone, rtol=1e-10, atol=1e-12)


def test_padding_and_absent_unknowns_get_no_gradient() -> None:
    encoder = text.Encoder({"length": 4, "alphabet": "ab"})
    encoder(torch.tensor([[2, 3, 0, 0]])).sum().backward()
    assert encoder.embedding.weight.grad is not None
    assert not encoder.embedding.weight.grad[:2].any()
    assert encoder.embedding.weight.grad[2:].any()


def test_features_start_at_unit_scale() -> None:
    torch.manual_seed(0)
    for length in (4, 16, 256):
        encoder = text.Encoder({"length": length, "alphabet": "".join(map(chr, range(97, 137)))})
        features = encoder(torch.randint(2, 42, (64, length)))
        assert features.shape == (64, FEATURES)
        assert 0.3 < features.square().mean().sqrt() < 3


def test_decoding_is_an_array_of_the_right_kind() -> None:
    assert text.decode("", {"length": 3, "alphabet": "a"}).tolist() == [0, 0, 0]
    assert text.decode("a", {"length": 3, "alphabet": "a"}).dtype == np.int16
