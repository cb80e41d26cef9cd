"""CacheView: what it accepts, what it refuses, and that it survives the pytree round trip."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import make_view, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, decode_cases
from torch.utils import _pytree as pytree

from mla.checks import ShapeError
from mla.codec import Int8Codec, PlainCodec
from mla.ops.library import NUM_VIEW_ARGUMENTS, flatten_view, unflatten_view, view_schema
from mla.view import CacheView, positions_of

FIELDS = ("C", "R", "codec", "max_length", "shard")
TENSORS = ("rows", "page_table", "lengths", "starts")


def assert_same_view(one: CacheView, other: CacheView) -> None:
    assert all(getattr(one, name) == getattr(other, name) for name in FIELDS)
    assert all(getattr(one, name) is getattr(other, name) for name in TENSORS)


@given(case=decode_cases(codec=st.sampled_from(CODECS)), bound=st.integers(0, 99))
def test_round_trips(case, bound):
    view = case.view()
    view = view.with_length(min(bound, view.capacity))
    leaves, spec = pytree.tree_flatten(view)
    assert_same_view(pytree.tree_unflatten(leaves, spec), view)
    loaded = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert_same_view(pytree.tree_unflatten(leaves, loaded), view)
    flat = flatten_view(view)
    assert len(flat) == NUM_VIEW_ARGUMENTS == view_schema().count(",") + 1
    assert_same_view(unflatten_view(flat), view)


def test_a_view_is_frozen_and_another_bound_is_another_view():
    view = make_view(randn(1, 4, 5, seed=0).double(), randn(1, 4, 2, seed=1).double(), [4])
    with pytest.raises(FrozenInstanceError):
        view.max_length = 1  # type: ignore[misc]
    assert view.with_length(2).max_length == 2 and view.max_length == 7 == view.capacity


@given(
    page_size=st.integers(1, 5), count=st.integers(1, 4), columns=st.integers(0, 6), data=st.data()
)
def test_positions_of_all_shards_are_all_positions(page_size, count, columns, data):
    def view(index: int) -> CacheView:
        return CacheView.paged(
            torch.empty(3, page_size, 7),
            torch.zeros(2, columns, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            C=5,
            R=2,
            shard=(index, count),
        )

    parts = [positions_of(view(index), columns) for index in range(count)]
    assert all(part.shape == (columns, page_size) for part in parts)
    together = torch.cat(parts).flatten().sort().values
    assert torch.equal(together, torch.arange(columns * page_size * count))
    index = data.draw(st.integers(0, count - 1))
    for column, positions in enumerate(parts[index].tolist()):
        first = (column * count + index) * page_size
        assert positions == list(range(first, first + page_size))
    assert view(0).capacity == columns * page_size * count == view(0).max_length


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_slices_of_a_larger_buffer_are_accepted(codec):
    """Other strides are free: one buffer may interleave layers."""
    W = codec.row_width(24, 6)
    buffer = torch.zeros(4, 3, 8, W, dtype=codec.storage_dtype(torch.bfloat16))
    view = CacheView.dense(
        buffer[:, 1, 2:], torch.zeros(4, dtype=torch.int32), C=24, R=6, codec=codec
    )
    assert view.capacity == 6 and view.batch_size == 4


LENGTHS = torch.zeros(2, dtype=torch.int32)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
ROWS = torch.zeros(2, 4, 7)
CODED_ROWS = torch.zeros(2, 4, 48, dtype=torch.uint8)


def dense(rows=ROWS, lengths=LENGTHS, **options):
    return CacheView.dense(rows, lengths, C=5, R=2, **options)


def paged(rows=ROWS, table=TABLE, lengths=LENGTHS, **options):
    return CacheView.paged(rows, table, lengths, C=5, R=2, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense(ROWS[0]), "rows has shape (4, 7), expected [P, Z, W]"),
        (
            lambda: dense(ROWS[..., :6]),
            "rows has shape (2, 4, 6), expected a last dim of 7 (plain codec, C=5, R=2)",
        ),
        (
            lambda: dense(codec=Int8Codec()),
            "rows has shape (2, 4, 7), expected a last dim of 48 (int8 codec, C=5, R=2)",
        ),
        (
            lambda: dense(ROWS.int()),
            "rows has dtype torch.int32, expected float64 to bfloat16 for the plain codec",
        ),
        (
            lambda: dense(ROWS.to(torch.float8_e4m3fn)),
            "rows has dtype torch.float8_e4m3fn, expected float64 to bfloat16 for the plain codec",
        ),
        (
            lambda: dense(CODED_ROWS.float(), codec=Int8Codec()),
            "rows has dtype torch.float32, expected torch.uint8 for the int8 codec",
        ),
        (
            lambda: dense(torch.zeros(2, 7, 4).transpose(1, 2)),
            "rows has last stride 4, expected 1",
        ),
        (
            lambda: dense(torch.zeros(2, 4, 49).byte()[..., :48], codec=Int8Codec()),
            "rows has strides (196, 49, 1) from offset 0, expected rows at multiples of 16 bytes",
        ),
        (
            lambda: dense(torch.zeros(2, 4, 64).byte()[..., 8:56], codec=Int8Codec()),
            "rows has strides (256, 64, 1) from offset 8, expected rows at multiples of 16 bytes",
        ),
        (lambda: dense(lengths=LENGTHS[:1]), "lengths has shape (1,), expected [B=2]"),
        (
            lambda: dense(lengths=LENGTHS.long()),
            "lengths has dtype torch.int64, expected torch.int32",
        ),
        (
            lambda: dense(lengths=LENGTHS.to("meta")),
            "lengths has device meta, expected cpu as rows has",
        ),
        (lambda: dense(starts=LENGTHS[None]), "starts has shape (1, 2), expected [B=2]"),
        (
            lambda: dense(starts=LENGTHS.long()),
            "starts has dtype torch.int64, expected torch.int32",
        ),
        (
            lambda: paged(table=TABLE.long()),
            "page_table has dtype torch.int64, expected torch.int32",
        ),
        (lambda: paged(table=TABLE[0]), "page_table has shape (3,), expected [B, M]"),
        (lambda: paged(table=TABLE[:1]), "lengths has shape (2,), expected [B=1]"),
        (lambda: dense(max_length=5), "max_length has value 5, expected 0 to 4"),
        (lambda: paged(max_length=13), "max_length has value 13, expected 0 to 12"),
        (lambda: dense(max_length=-1), "max_length has value -1, expected 0 to 4"),
        (
            lambda: paged(shard=(2, 2)),
            "shard has value (2, 2), expected (index, count) with 0 <= index < count",
        ),
        (
            lambda: replace(dense(), shard=(0, 2)).validated(),
            "shard has value (0, 2), expected (0, 1) for the dense layout",
        ),
    ],
)
def test_fields_that_do_not_fit(make, message):
    with pytest.raises(ShapeError, match=re.escape(f"CacheView: {message}")):
        make()


def test_bound_letters_are_compared():
    sizes = {"B": 2}
    dense().bind_dims("op", sizes)
    assert sizes == {"B": 2, "C": 5, "R": 2}
    with pytest.raises(ShapeError, match="op: view has C=5, expected C=6"):
        dense().bind_dims("op", {"C": 6})
    assert dense().codec == PlainCodec()
