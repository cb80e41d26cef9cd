"""The C++ decode: every instruction set against the oracle, bit for bit alone and in company.

Sizes that use more than one block, split, panel and task are drawn here; tests/test_decode.py runs
the same kernels through the op.
"""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_lse_within_budget, assert_within_budget, make_view, poison_, randn
from helpers import stored_rows as stored
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, SEEDS, DecodeCase, decode_cases
from test_decode import attend
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError
from mla.codec import Int8Codec, PlainCodec
from mla.kernels import cpu
from mla.ops import mla_decode
from mla.view import CacheView

F64 = torch.float64
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

if cpu.reason_absent():
    pytest.skip(f"C++ kernels: {cpu.reason_absent()}", allow_module_level=True)


def sets() -> Any:
    """Every instruction set; those that the processor lacks are skipped by name."""
    here = cpu.describe().instruction_sets
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name, marks=pytest.mark.skipif(name not in here, reason=f"no {name} processor")
            )
            for name in cpu.INSTRUCTION_SETS
        ],
    )


def run(case: DecodeCase, view: CacheView, name: str | None = None) -> tuple[Tensor, Tensor]:
    return cpu.decode(
        *case.queries(), view, case.scale, case.counts(), case.dtype, instruction_set=name
    )


def check(case: DecodeCase, name: str, shard: tuple[int, int] = (0, 1)) -> None:
    view = case.view(shard)
    rows = stored(view, case.S)
    out, lse = run(case, view, name)
    oracle, plain = attend(case, rows, F64), attend(case, rows, case.dtype)
    assert_within_budget(out, oracle.out, plain.out, "out")
    assert_lse_within_budget(lse, oracle.lse, plain.lse)
    assert out.dtype == case.dtype and lse.dtype == torch.float32


@sets()
@given(case=decode_cases(dtype=DTYPES))
def test_matches_the_oracle(name, case):
    check(case, name)


@sets()
@given(case=decode_cases(dtype=DTYPES, codec=st.sampled_from(CODECS[1:])))
def test_coded_rows_match_the_oracle(name, case):
    check(case, name)


# Rows that are read where they lie (C a multiple of the column tile), several blocks and splits.
LONG = st.lists(st.sampled_from([0, 1, 95, 96, 97, 288, 300, 577]), min_size=1, max_size=3)


@sets()
@given(
    case=decode_cases(
        dtype=DTYPES,
        C=st.sampled_from([64, 128]),
        R=st.sampled_from([0, 32, 64]),
        H=st.sampled_from([1, 2, 4, 5, 8, 16, 17, 33]),
        L=st.sampled_from([1, 2, 5]),
        lengths=LONG.map(tuple),
        page_size=st.sampled_from([None, 1, 7, 64]),
    )
)
def test_rows_read_in_place_match_the_oracle(name, case):
    check(case, name)


@sets()
@given(case=decode_cases(dtype=torch.float32, H=st.sampled_from([64, 150]), L=3))
def test_more_rows_than_one_task_holds(name, case):
    check(case, name)


COMPANY = decode_cases(
    dtype=DTYPES,
    codec=st.sampled_from([PlainCodec(), Int8Codec()]),
    C=st.sampled_from([40, 64]),
    H=st.sampled_from([3, 20, 40]),
    lengths=st.lists(st.sampled_from([0, 1, 40, 97, 600]), min_size=2, max_size=3).map(tuple),
)


def pick(values: tuple[int, ...] | None, order: list[int]) -> tuple[int, ...] | None:
    return None if values is None else tuple(values[b] for b in order)


def rows_of(view: CacheView, order: list[int]) -> CacheView:
    """The batch rows ``order`` of a view, in that order."""
    rows = view.rows if view.page_table is not None else view.rows[order]
    table = None if view.page_table is None else view.page_table[order]
    starts = None if view.starts is None else view.starts[order]
    return replace(view, rows=rows, page_table=table, lengths=view.lengths[order], starts=starts)


@sets()
@given(case=COMPANY, data=st.data())
def test_a_row_does_not_depend_on_its_company(name, case, data):
    view = case.view()
    q_latent, q_rope = case.queries()
    out, lse = run(case, view, name)
    order = data.draw(st.permutations(range(case.B)))
    for chosen in ([data.draw(st.integers(0, case.B - 1))], order):
        counts = case.counts()
        again = cpu.decode(
            q_latent[chosen],
            q_rope[chosen],
            rows_of(view, chosen),
            case.scale,
            None if counts is None else counts[chosen],
            case.dtype,
            instruction_set=name,
        )
        assert torch.equal(again[0], out[chosen]) and torch.equal(again[1], lse[chosen])


@sets()
@given(case=COMPANY, page_size=st.sampled_from([1, 5, 128]))
def test_pages_change_no_bit(name, case, page_size):
    dense = replace(case, page_size=None)
    paged = replace(case, page_size=page_size)
    expected, again = run(dense, dense.view(), name), run(paged, paged.view(), name)
    assert torch.equal(expected[0], again[0]) and torch.equal(expected[1], again[1])


@given(case=COMPANY, threads=st.sampled_from([2, 3, 5]))
def test_threads_change_no_bit(case, threads):
    view = case.view()
    one = run(case, view)
    torch.set_num_threads(threads)
    try:
        many = run(case, view)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


def test_threads_change_no_bit_where_they_have_work():
    case = DecodeCase(
        L=1, H=70, C=64, R=32, lengths=(2000, 30, 700), starts=None, query_lengths=None,
        page_size=None, codec=PlainCodec(), dtype=torch.bfloat16, magnitudes=(1, 1), seed=3,
    )  # fmt: skip
    view = case.view()
    results = []
    try:
        for threads in (1, 2, 4, 9):
            torch.set_num_threads(threads)
            results += [run(case, view) for _ in range(5)]
    finally:
        torch.set_num_threads(1)
    assert all(
        torch.equal(x, y) for other in results for x, y in zip(results[0], other, strict=True)
    )


@sets()
@given(case=decode_cases(dtype=DTYPES, page_size=st.sampled_from([1, 3])), count=st.integers(2, 3))
def test_shards_match_the_oracle(name, case, count):
    view = case.view((1, count))
    rows = stored(view, case.S)
    out, lse = run(case, view, name)
    keep = ~rows[0][..., 0].isnan()  # what this shard holds; the oracle has no shards
    for b in range(case.B):
        assert torch.isfinite(out[b]).all()
        if not keep[b].any():
            assert (lse[b] == float("-inf")).all()


@given(seed=SEEDS, dtype=DTYPES, data=st.data())
def test_strided_queries_and_rows(seed, dtype, data):
    C, R, H, S = 64, 32, 6, 130
    q = randn(2, H, 3, 2 * (C + R), seed=seed, dtype=dtype).transpose(1, 2)
    q_latent, q_rope = q[..., 5 : 5 + C], q[..., 100 : 100 + R]
    pool = poison_(torch.empty(S, 2, C + R + 7, dtype=dtype)).transpose(0, 1)
    rows = pool[..., 3 : 3 + C + R]
    rows.copy_(randn(2, S, C + R, seed=seed + 1, dtype=dtype))
    lengths = torch.tensor([[S, -9], [77, -9]], dtype=torch.int32)[:, 0]
    view = CacheView.dense(rows, lengths, C=C, R=R)
    whole = CacheView.dense(rows.contiguous(), lengths.contiguous(), C=C, R=R)
    out, lse = cpu.decode(q_latent, q_rope, view, 0.1, None, dtype)
    expected = cpu.decode(q_latent.contiguous(), q_rope.contiguous(), whole, 0.1, None, dtype)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def small(**changes: Any) -> CacheView:
    view = make_view(
        *(randn(2, 9, w, seed=w, dtype=F64) for w in (5, 2)), [9, 4], page_size=4, seed=1
    )
    return replace(view, **changes)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": int32(9, -1)}, "lengths has values up to -1"),
        ({"lengths": int32(9, 99)}, "lengths has values up to 99, expected at most"),
        ({"lengths": int32(9)}, "lengths has size 1 in dim 0, expected 2"),
        ({"lengths": torch.tensor([9, 4])}, "lengths has another dtype, expected int32"),
        ({"starts": int32(9, 4, 4)}, "starts has size 3"),
        ({"page_table": int32([0, 1, 99, 0], [0, 1, 1, 0])}, "page_table has pages 0 to 99 in use"),
        ({"page_table": int32([0, -1, 1, 0], [0, 1, 1, 0])}, "page_table has pages -1 to 1 in use"),
        ({"page_table": int32([0, 1, 1, 0])}, "page_table has size 1 in dim 0, expected 2"),
        ({"page_table": int32([0], [1])}, "lengths has values up to 9"),
        ({"rows": torch.zeros(2, 4, 6)}, "rows has size 6 in dim 2, expected 7"),
        ({"rows": torch.zeros(4, 7)}, "rows has 2 dims, expected 3"),
        ({"rows": torch.zeros(12, 4, 7, dtype=torch.uint8)}, "a dtype that is not its codec's"),
        ({"rows": torch.zeros(12, 4, 7, dtype=torch.int64)}, "rows has another dtype"),
        ({"rows": torch.zeros(12, 4, 14)[..., ::2]}, "rows has last stride 2, expected 1"),
        ({"shard": (2, 2)}, "shard has value"),
        ({"shard": (-1, 1)}, "shard has value"),
        ({"page_table": None}, "rows has size"),
    ],
)
def test_views_that_are_none_are_refused(changes, message):
    """By the extension itself: `CacheView` refuses most of them before."""
    q = [torch.zeros(2, 1, 3, width) for width in (5, 2)]
    with pytest.raises(ShapeError, match=r"^CacheView: ") as error:
        cpu.decode(*q, small(**changes), 1.0, None, torch.float32)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "counts", "message"),
    [
        (((2, 1, 3, 5), (2, 1, 4, 2)), None, "q_rope has size 4 in dim 2, expected 3"),
        (((2, 1, 15), (2, 1, 3, 2)), None, "q_latent has 3 dims, expected 4"),
        (((2, 1, 3, 5), (2, 1, 3, 2)), int32(1), "query_lengths has size 1"),
        (((2, 1, 3, 5), (2, 1, 3, 2)), int32(1, 2), "query_lengths has value 2, expected 0 to L=1"),
        (((2, 1, 3, 5), (2, 1, 3, 2)), int32(-1, 1), "query_lengths has value -1"),
    ],
)
def test_queries_that_do_not_fit_are_refused(shapes, counts, message):
    q = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ShapeError, match=re.escape(message)):
        cpu.decode(*q, small(), 1.0, counts, torch.float32)


@pytest.mark.parametrize("sections", [(2, 15, 16, 16, 32), (2, 16, 7, 16, 32), (2, 16, 16, 0, 32),
                                      (2, 16, 16, 16, 48), (9, 16, 16, 16, 32)])  # fmt: skip
def test_codecs_that_are_none_are_refused(monkeypatch, sections):
    rows = torch.zeros(2, 9, 48, dtype=torch.uint8)
    view = CacheView.dense(rows, int32(9, 4), C=5, R=2, codec=Int8Codec())
    q = [torch.zeros(2, 1, 3, width) for width in (5, 2)]
    monkeypatch.setattr(cpu, "_sections", lambda *_: sections)
    with pytest.raises(ShapeError, match="codec has"):
        cpu.decode(*q, view, 1.0, None, torch.float32)


def test_coded_rows_out_of_place_are_refused():
    rows = torch.zeros(2 * 9 * 48 + 8, dtype=torch.uint8)[8:].view(2, 9, 48)
    view = replace(
        CacheView.dense(rows.clone(), int32(9, 4), C=5, R=2, codec=Int8Codec()), rows=rows
    )
    q = [torch.zeros(2, 1, 3, width) for width in (5, 2)]
    with pytest.raises(ShapeError, match="do not begin at multiples of 16 bytes"):
        cpu.decode(*q, view, 1.0, None, torch.float32)


def test_an_instruction_set_that_does_not_exist():
    q = [torch.zeros(2, 1, 3, width) for width in (5, 2)]
    with pytest.raises(UnsupportedError, match="instruction_set has value 'neon'"):
        cpu.decode(*q, small(), 1.0, None, torch.float32, instruction_set="neon")


def test_decode_has_no_gradient():
    view = make_view(*(randn(1, 7, w, seed=w, dtype=F64) for w in (24, 6)), [7])
    q = [randn(1, 1, 3, w, seed=w).requires_grad_() for w in (24, 6)]
    out = mla_decode(*q, view, scale=0.2, impl="cpp").out
    with pytest.raises(UnsupportedError, match="expected no gradient; train through mla_prefill"):
        out.sum().backward()


def test_float64_goes_elsewhere():
    view = make_view(*(randn(1, 7, w, seed=w, dtype=F64) for w in (24, 6)), [7], dtype=F64)
    q = [randn(1, 1, 3, w, seed=w, dtype=F64) for w in (24, 6)]
    with pytest.raises(UnsupportedError, match="impl='cpp' needs float32, bfloat16 or float16"):
        mla_decode(*q, view, scale=0.2, impl="cpp")
    assert mla_decode(*q, view, scale=0.2).out.dtype == F64


def _in_child(connection: Any) -> None:
    torch.set_num_threads(1)
    out, lse = mla_decode(*FORKED[1], FORKED[0], scale=0.1, impl="cpp")
    connection.send((out.tolist(), lse.tolist()))


FORKED: Any = None


def test_in_a_forked_worker():
    """After the parent used the kernel, as a DataLoader's worker does."""
    global FORKED
    view = make_view(*(randn(1, 300, w, seed=w, dtype=F64) for w in (64, 32)), [300])
    FORKED = (view, [randn(1, 1, 20, w, seed=w) for w in (64, 32)])
    out, lse = mla_decode(*FORKED[1], view, scale=0.1, impl="cpp")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(theirs,))
    child.start()
    assert ours.poll(60), "the child hangs"
    again = ours.recv()
    child.join()
    assert again == (out.tolist(), lse.tolist())
