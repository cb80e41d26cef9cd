"""The C++ decode of int8 and int4 rows, which AVX-512 with VNNI multiplies as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import assert_within_budget, make_view, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, SEEDS, DecodeCase, decode_cases
from test_cpp_decode import LONG, check, sets
from torch import Tensor

from mla.codec import Int4Codec, Int8Codec, rotate_latent
from mla.kernels import cpu


@dataclass(frozen=True)
class SpikyCase(DecodeCase):
    """Queries in which a few values are far larger than the rest."""

    spike: float = 1.0

    def queries(self) -> tuple[Tensor, Tensor]:
        q_latent, q_rope = super().queries()
        spikes = randn(self.C, seed=self.seed + 4).abs() > 2
        return torch.where(spikes, q_latent * self.spike, q_latent), q_rope

    @property
    def scale(self) -> float:
        return super().scale / max(1.0, self.spike / 4)


# Widths and groups that byte products take, queries of 8 bits and (where they have spikes) of 16.
BYTES = decode_cases(
    dtype=torch.bfloat16,
    codec=st.sampled_from(
        [
            Int8Codec(),
            Int8Codec(group=64, rope_bits=8),
            Int8Codec(group=512),
            Int8Codec(rotation=True),
            Int4Codec(),
            Int4Codec(group=128, rope_bits=8, rotation=False),
        ]
    ),
    C=st.sampled_from([64, 192, 512]),
    R=st.sampled_from([0, 32, 64]),
    H=st.sampled_from([1, 3, 5, 16, 20, 33]),
    L=st.sampled_from([1, 2, 5]),
    lengths=LONG.map(tuple),
    page_size=st.sampled_from([None, 7, 64]),
)


@sets()
@given(case=BYTES, spike=st.sampled_from([1.0, 10.0, 300.0]))
def test_coded_rows_multiplied_as_bytes(name, case, spike):
    check(SpikyCase(**vars(case), spike=spike), name)


@sets()
@pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec(rotation=False)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(name, codec, bad):
    case = DecodeCase(
        L=1, H=3, C=128, R=32, lengths=(130, 130), starts=None, query_lengths=None,
        page_size=None, codec=codec, dtype=torch.bfloat16, magnitudes=(1, 1), seed=5,
    )  # fmt: skip
    q_latent, q_rope = case.queries()
    q_latent[0, 0, 1, 7] = bad
    out, lse = cpu.decode(
        q_latent, q_rope, case.view(), case.scale, None, case.dtype, instruction_set=name
    )
    assert not torch.isfinite(out[0, 0, 1]).any() and not torch.isfinite(lse[0, 0, 1])
    assert torch.isfinite(out[1]).all() and torch.isfinite(out[0, 0, [0, 2]]).all()
    latent, k_rope = case.rows()
    latent[1, 100, 3] = bad
    view = make_view(latent, k_rope, [130, 130], codec=codec, dtype=case.dtype)
    out, _ = cpu.decode(*case.queries(), view, case.scale, None, case.dtype, instruction_set=name)
    assert not torch.isfinite(out[1, 0, :, :64]).any() and torch.isfinite(out[0]).all()


@given(
    C=st.sampled_from([1, 24, 96, 128, 512]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=SEEDS,
)
def test_rotation_is_that_of_the_codec(C, dtypes, seed):
    latent = randn(2, 3, C, seed=seed, dtype=dtypes[0])
    exact = rotate_latent(latent.double())
    plain = rotate_latent(latent.float()).to(dtypes[1])
    assert_within_budget(cpu._rotate(latent, dtypes[1]), exact, plain, "rotated")


@pytest.mark.parametrize("codec", [Int8Codec(), Int4Codec()])
def test_halves_of_one_query(codec):
    """Queries that are slices of wider rows, as layers hand them over."""
    view = make_view(*(randn(2, 70, w, seed=w, dtype=torch.float64) for w in (64, 32)), [70, 9],
                     codec=codec, dtype=torch.bfloat16)  # fmt: skip
    query = randn(2, 1, 3, 96, seed=8, dtype=torch.bfloat16)
    halves = query.split([64, 32], dim=-1)
    out, lse = cpu.decode(*halves, view, 0.1, None, torch.bfloat16)
    whole = [x.contiguous() for x in halves]
    expected = cpu.decode(*whole, view, 0.1, None, torch.bfloat16)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
