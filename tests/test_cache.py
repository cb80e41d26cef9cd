"""DenseLatentCache against a dictionary of rows, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from mla.cache import CacheFull, DenseLatentCache
from mla.cache.dense import GROWTH, ROUND_TO
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec, rotate_latent
from mla.config import MLAConfig
from mla.ops import mla_gather


def config(C: int, R: int) -> MLAConfig:
    return MLAConfig(
        hidden_size=8,
        num_attention_heads=2,
        kv_lora_rank=C,
        qk_nope_head_dim=4,
        qk_rope_head_dim=R,
        v_head_dim=4,
    )


SIZES = ((24, 6), (7, 2), (5, 0))  # of layers 0, 1 and 2
CODECS = (PlainCodec(), Fp8Codec(), Int8Codec(rope_bits=8), Int4Codec())


class CacheMachine(RuleBasedStateMachine):
    """Random steps; the model is one list of tagged rows for each layer and batch row."""

    @initialize(
        B=st.integers(1, 3),
        capacity=st.none() | st.integers(1, 30),
        num_layers=st.integers(1, 3),
        codec=st.sampled_from(CODECS),
    )
    def start(self, B: int, capacity: int | None, num_layers: int, codec: Codec) -> None:
        configs = [config(*sizes) for sizes in SIZES[:num_layers]]
        self.cache = DenseLatentCache(
            configs, batch_size=B, max_length=capacity, codec=codec, dtype=torch.float32
        )
        self.B, self.capacity, self.codec = B, capacity, codec
        self.rows: list[list[list[Tensor]]] = [[[] for _ in range(B)] for _ in configs]
        self.starts = [0] * B
        self.serial = self.peak = 0
        self.addresses = [self.cache.view(layer).rows.data_ptr() for layer in range(num_layers)] + [
            self.cache.lengths.data_ptr()
        ]

    def lengths(self) -> list[int]:
        return [len(rows) for rows in self.rows[0]]

    def tagged(self, layer: int, b: int) -> Tensor:
        """A row that names its owner: layer, batch row and a serial number."""
        self.serial += 1
        C, R = SIZES[layer]
        noise = torch.randn(C + R, generator=torch.Generator().manual_seed(self.serial))
        noise[:3] = torch.tensor([layer, b, self.serial], dtype=torch.float32)
        return noise

    @rule(data=st.data(), extra=st.integers(0, 2), is_uniform=st.booleans())
    def step(self, data: Any, extra: int, is_uniform: bool) -> None:
        count = st.integers(0, 9)
        counts = data.draw(
            count.map(lambda n: [n] * self.B) if is_uniform else st.tuples(*[count] * self.B)
        )
        starts = None
        is_cold = max(self.lengths()) == 0
        if is_cold and data.draw(st.booleans()):
            starts = [data.draw(st.integers(0, n)) for n in counts]
        wanted = [old + new for old, new in zip(self.lengths(), counts, strict=True)]
        argument = counts[0] if len(set(counts)) == 1 and data.draw(st.booleans()) else counts
        if self.capacity is not None and max(wanted) > self.capacity:
            with pytest.raises(CacheFull, match="nothing was appended"):
                self.cache.reserve(argument, starts=starts)
            return
        self.cache.reserve(argument, starts=starts)
        if is_cold:
            self.starts = [0] * self.B if starts is None else starts
        self.peak = max(self.peak, *wanted)
        assert self.cache.is_cold == is_cold
        L = max(counts) + (0 if isinstance(argument, int) else extra)
        new_lengths = self.cache.new_lengths(L)
        assert (new_lengths is None) == all(n == L for n in counts)
        if new_lengths is not None:
            assert new_lengths.tolist() == list(counts)
        for layer, (C, R) in enumerate(SIZES[: len(self.rows)]):
            new = torch.full((self.B, L, C + R), float("nan"))
            for b, n in enumerate(counts):
                for i in range(n):
                    new[b, i] = self.tagged(layer, b)
                    self.rows[layer][b].append(new[b, i])
            view = self.cache.append(layer, new[..., :C], new[..., C:])
            assert view.lengths is self.cache.lengths

    @precondition(lambda self: max(self.lengths()) > 0)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        wanted = [
            data.draw(st.integers(start, n))
            for start, n in zip(self.starts, self.lengths(), strict=True)
        ]
        self.cache.truncate(wanted)
        for layer in self.rows:
            for b, n in enumerate(wanted):
                del layer[b][n:]

    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        order = [data.draw(st.integers(0, self.B - 1)) for _ in range(self.B)]
        self.cache.reorder(order)
        self.rows = [[list(layer[b]) for b in order] for layer in self.rows]
        self.starts = [self.starts[b] for b in order]

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.rows = [[[] for _ in range(self.B)] for _ in self.rows]
        self.starts = [0] * self.B

    @rule(data=st.data())
    def refused(self, data: Any) -> None:
        """Nothing changes; the invariants see to it."""
        longest = [n + 1 for n in self.lengths()]
        calls = [
            lambda: self.cache.reserve(-1),
            lambda: self.cache.reserve([1] * (self.B + 1)),
            lambda: self.cache.reserve(1, starts=[2] * self.B),
            lambda: self.cache.truncate(longest),
            lambda: self.cache.truncate([-1] * self.B),
            lambda: self.cache.reorder([self.B] * self.B),
            lambda: self.cache.reorder([0] * (self.B + 1)),
            lambda: self.cache.view(len(self.rows)),
        ]
        with pytest.raises(ShapeError):
            data.draw(st.sampled_from(calls))()

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        cache = self.cache
        assert cache.lengths.tolist() == self.lengths()
        assert cache.max_length == max(self.lengths())
        starts = [0] * self.B if cache.starts is None else cache.starts.tolist()
        assert starts == self.starts and (cache.starts is not None) == any(self.starts)
        for layer, ((C, R), rows) in enumerate(zip(SIZES, self.rows, strict=False)):
            latent, k_rope = mla_gather(cache.view(layer), 0, cache.max_length, dtype=torch.float32)
            expected = torch.zeros(self.B, cache.max_length, C + R)
            for b, of_row in enumerate(rows):
                for position in range(self.starts[b], len(of_row)):
                    row = of_row[position]
                    expected[b, position] = stored_and_read(self.codec, row, C, R)
            actual = torch.cat([latent, k_rope], dim=-1)
            if self.codec.kind == "plain":
                assert torch.equal(actual, expected)
            else:
                torch.testing.assert_close(actual, expected)

    @invariant()
    def storage_is_bounded(self) -> None:
        positions = self.capacity or GROWTH * self.peak + ROUND_TO
        bytes_of_position = sum(
            rows.element_size() * rows.shape[2] * self.B
            for rows in (self.cache.view(layer).rows for layer in range(len(self.rows)))
        )
        assert self.cache.nbytes <= positions * bytes_of_position
        assert self.cache.nbytes == self.cache.capacity * bytes_of_position
        assert self.cache.capacity >= self.peak
        if self.capacity is not None:
            addresses = [self.cache.view(i).rows.data_ptr() for i in range(len(self.rows))]
            assert [*addresses, self.cache.lengths.data_ptr()] == self.addresses
            assert self.cache.view(0).max_length == self.cache.capacity == self.capacity


def stored_and_read(codec: Codec, row: Tensor, C: int, R: int) -> Tensor:
    """What one row becomes when it is stored and read back."""
    stored = codec.decode(codec.encode(row[:C], row[C:]), C, R, torch.float32)
    latent = rotate_latent(stored[:C]) if codec.rotation else stored[:C]
    return torch.cat([latent, stored[C:]])


class TestCacheMachine(CacheMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=20, stateful_step_count=12, deadline=None)


def small(**options: Any) -> DenseLatentCache:
    defaults: dict[str, Any] = {"batch_size": 2, "dtype": torch.float32}
    return DenseLatentCache(config(5, 2), **{**defaults, **options})


def test_growth_is_amortised():
    """Copies stay below a few times what is appended, however long the cache grows."""
    cache = small(batch_size=1)
    copied, grown = 0, 0
    for length in range(3000):
        before = cache.view(0).rows.data_ptr()
        cache.reserve(1)
        if cache.view(0).rows.data_ptr() != before:
            copied, grown = copied + length, grown + 1
    assert copied <= 3 * 3000 and grown < 12


@given(first=st.integers(1, 200), more=st.lists(st.integers(0, 150), max_size=5))
def test_growth_keeps_the_contents(first, more):
    cache = small(batch_size=1)
    written = torch.empty(0, 7)
    for i, count in enumerate([first, *more]):
        new = torch.randn(1, count, 7, generator=torch.Generator().manual_seed(i))
        cache.reserve(count)
        cache.append(0, new[..., :5], new[..., 5:])
        written = torch.cat([written, new[0]])
    rows = torch.cat(mla_gather(cache.view(0), 0, len(written), dtype=torch.float32), dim=-1)
    assert torch.equal(rows[0], written)


def test_a_step_of_the_layers_reserves_once():
    cache = small(num_layers=2)
    rows = torch.zeros(2, 3, 7)
    for _ in range(2):
        for layer in range(2):
            cache.ensure_reserved(layer, 3, starts=None)
            cache.append(layer, rows[..., :5], rows[..., 5:])
    assert cache.lengths.tolist() == [6, 6]
    cache.reserve(3)  # by the caller: the layers do not reserve again
    for layer in range(2):
        cache.ensure_reserved(layer, 3, starts=None)
        cache.append(layer, rows[..., :5], rows[..., 5:])
    assert cache.lengths.tolist() == [9, 9]


def test_layers_do_not_reserve_inside_a_compiled_region():
    cache = small()

    def step() -> None:
        cache.ensure_reserved(0, 1, starts=None)

    with pytest.raises(Exception, match="the step has no reservation, expected") as error:
        torch.compile(step, backend="eager", fullgraph=True)()
    assert "UnsupportedError" in str(error.value) or isinstance(error.value, UnsupportedError)
    assert cache.lengths.tolist() == [0, 0]


def test_a_failed_append_can_be_repeated():
    cache = small()
    cache.reserve(2)
    with pytest.raises(ShapeError):
        cache.append(0, torch.zeros(2, 2, 4), torch.zeros(2, 2, 2))
    cache.append(0, torch.zeros(2, 2, 5), torch.zeros(2, 2, 2))
    assert cache.lengths.tolist() == [2, 2]


def test_defaults():
    torch.set_default_dtype(torch.bfloat16)
    cache = DenseLatentCache(config(5, 2), batch_size=1, max_length=3)
    assert cache.view(0).rows.dtype == torch.bfloat16 and cache.nbytes == 3 * 7 * 2
    assert cache.device.type == "cpu" and cache.num_layers == 1
    coded = DenseLatentCache(config(512, 64), batch_size=2, max_length=3, codec=Fp8Codec())
    assert coded.nbytes == 2 * 3 * 656


ROWS = torch.zeros(2, 3, 7)


def filled() -> DenseLatentCache:
    cache = small(max_length=8)
    cache.reserve([3, 2], starts=[1, 0])
    cache.append(0, ROWS[..., :5], ROWS[..., 5:])
    return cache


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: c.reserve([1, 2, 3]),
            "DenseLatentCache.reserve: new_lengths has value [1, 2, 3], expected 2 numbers of at "
            "least 0",
        ),
        (
            lambda c: c.reserve(1, starts=[0, 0]),
            "DenseLatentCache.reserve: starts has a value, expected None in a filled cache",
        ),
        (
            lambda c: c.reset() or c.reserve([1, 2], starts=[2, 0]),
            "DenseLatentCache.reserve: starts has value [2, 0], expected 2 numbers, each at most "
            "the new tokens of its row",
        ),
        (
            lambda c: c.append(0, ROWS[..., :5], ROWS[..., 5:]),
            "DenseLatentCache.append: layer_idx=0 has no reservation, expected "
            "reserve(new_lengths) once before the first layer of a step",
        ),
        (
            lambda c: c.reserve(2) or c.append(0, ROWS[..., :5], ROWS[..., 5:]),
            "DenseLatentCache.append: latent has shape (2, 3, 5), expected [B=2, L=2, width] as "
            "reserved",
        ),
        (
            lambda c: c.append(1, ROWS[..., :5], ROWS[..., 5:]),
            "DenseLatentCache.append: layer_idx has value 1, expected 0 to 0",
        ),
        (lambda c: c.view(-1), "DenseLatentCache.view: layer_idx has value -1, expected 0 to 0"),
        (
            lambda c: c.truncate([0, 2]),
            "DenseLatentCache.truncate: lengths has value [0, 2], expected at most [3, 2], and at "
            "least the first visible positions",
        ),
        (
            lambda c: c.reorder([0, 2]),
            "DenseLatentCache.reorder: indices has value [0, 2], expected 2 numbers of 0 to 1",
        ),
        (
            lambda c: small(batch_size=0),
            "DenseLatentCache: batch_size, layers have values 0, 1, expected at least 1 of each",
        ),
        (
            lambda c: small(num_layers=0),
            "DenseLatentCache: batch_size, layers have values 2, 0, expected at least 1 of each",
        ),
        (
            lambda c: small(max_length=0),
            "DenseLatentCache: max_length has value 0, expected at least 1 or None",
        ),
        (
            lambda c: small(dtype=torch.int8),
            "DenseLatentCache: dtype has value torch.int8, expected float64 to bfloat16",
        ),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ShapeError, match=re.escape(message)):
        call(filled())


def test_full():
    cache = filled()
    message = (
        "DenseLatentCache: max_length has value 8, expected at least 9 for the new tokens; "
        "nothing was appended"
    )
    with pytest.raises(CacheFull, match=re.escape(message)):
        cache.reserve([6, 0])
    assert issubclass(CacheFull, ValueError) and cache.lengths.tolist() == [3, 2]
    cache.reserve([5, 6])
    assert cache.lengths.tolist() == [8, 8]
