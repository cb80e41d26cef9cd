"""The checks that every public function makes, and the texts they give."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import (
    ShapeError,
    UnsupportedError,
    bind_dims,
    require_device,
    require_int32,
    require_same,
)

NAMES = st.lists(st.sampled_from("BLHCRS"), min_size=1, max_size=4, unique=True)


def test_errors_are_value_errors():
    assert issubclass(ShapeError, ValueError) and issubclass(UnsupportedError, ValueError)
    assert not issubclass(ShapeError, UnsupportedError)


@given(letters=NAMES, data=st.data())
def test_letters_are_bound_once_and_compared_after(letters, data):
    shape = data.draw(st.tuples(*[st.integers(0, 5)] * len(letters)))
    known = data.draw(st.sets(st.sampled_from(letters)))
    bound = dict(zip(letters, shape, strict=True))
    sizes = {letter: bound[letter] for letter in known}
    bind_dims("op", "x", torch.empty(shape), " ".join(letters), sizes)
    assert sizes == bound
    wrong = data.draw(st.sampled_from(letters))
    sizes = {letter: bound[letter] + (letter == wrong) for letter in {*known, wrong}}
    before = dict(sizes)
    with pytest.raises(ShapeError, match=re.escape(f"op: x has shape {shape}, expected [")):
        bind_dims("op", "x", torch.empty(shape), " ".join(letters), sizes)
    assert sizes == before, "a failed check binds nothing"


@pytest.mark.parametrize(
    ("dims", "sizes", "expected"),
    [
        ("B L H C", {}, "[B, L, H, C]"),
        ("B C", {"B": 2}, "[B=2, C]"),
        ("B 3 C", {"C": 7}, "[B, 3, C=7]"),
        ("B 2 T'", {"B": 1, "T'": 4}, "[B=1, 2, T'=4]"),
    ],
)
def test_the_text_names_what_is_known(dims, sizes, expected):
    with pytest.raises(ShapeError) as error:
        bind_dims("mla_decode", "q_latent", torch.empty(2, 2, 5), dims, sizes)
    assert str(error.value) == f"mla_decode: q_latent has shape (2, 2, 5), expected {expected}"


def test_numbers_stand_for_themselves():
    sizes: dict[str, int] = {}
    bind_dims("op", "x", torch.empty(2, 3), "B 3", sizes)
    assert sizes == {"B": 2}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: bind_dims("op", "x", [[1.0]], "B C", {}),
            "op: x has type list, expected a torch.Tensor",
        ),
        (
            lambda: require_same("op", "x", torch.ones(1).half(), "y", torch.ones(1)),
            "op: x has dtype torch.float16, expected torch.float32 as y has",
        ),
        (
            lambda: require_same("op", "x", torch.ones(1, device="meta"), "y", torch.ones(1)),
            "op: x has device meta, expected cpu as y has",
        ),
        (
            lambda: require_device("op", "x", torch.ones(1), "y", torch.ones(1, device="meta")),
            "op: x has device cpu, expected meta as y has",
        ),
        (
            lambda: require_int32("op", "lengths", torch.ones(1, dtype=torch.int64)),
            "op: lengths has dtype torch.int64, expected torch.int32",
        ),
    ],
)
def test_messages(check, message):
    with pytest.raises(ShapeError) as error:
        check()
    assert str(error.value) == message
