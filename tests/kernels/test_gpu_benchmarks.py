"""What `benchmarks.gpu` times is right: its own baseline scheme, and the gate that guards it."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE, DTYPES
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from benchmarks import gpu_append, gpu_decode, gpu_prefill
from benchmarks.gpu_baseline import two_load_decode
from benchmarks.harness import GateError
from mla import reference
from mla.view import CacheView


@settings(max_examples=8)
@given(
    H=st.sampled_from([1, 16, 20]),
    lengths=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    page=st.sampled_from([1, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_baseline_matches_the_oracle(H, lengths, page, dtype, seed) -> None:
    C, R, rng = 32, 6, generator(seed)
    pages = -(-max(1, *lengths) // page)
    rows = torch.randn(2 * pages, page, C + R, generator=rng)
    table = torch.randperm(2 * pages, generator=rng).view(2, pages)
    queries = [torch.randn(2, 1, H, n, generator=rng).to(dtype) for n in (C, R)]
    rows, lengths = rows.to(dtype), torch.tensor(lengths, dtype=torch.int32)
    dense = rows[table].flatten(1, 2).double()
    oracle = reference.absorbed_attention(
        *(q.double() for q in queries), dense[..., :C], dense[..., C:], lengths, scale=0.3
    ).out
    for b, length in enumerate(lengths.tolist()):  # nothing behind the end may count
        where = dense.new_ones(pages * page).bool()
        where[:length] = False
        flat = rows.flatten(0, 1)
        index = (table[b, :, None] * page + torch.arange(page)).flatten()
        flat[index[where]] = float("nan")
    view = CacheView.paged(rows.to(DEVICE), table.int().to(DEVICE), lengths.to(DEVICE), C=C, R=R)
    found = two_load_decode(*(q.to(DEVICE) for q in queries), view, 0.3).cpu().double()
    # A baseline, not one of ours: some tens of roundings of values around 1 are near enough.
    torch.testing.assert_close(found, oracle, rtol=0, atol=40 * torch.finfo(dtype).eps)


CASES = [
    (gpu_decode, {"impl": "triton", "H": 16, "codec": "plain"}),
    (gpu_decode, {"impl": "triton", "H": 16, "codec": "int4"}),
    (gpu_decode, {"impl": "engines", "H": 16, "codec": "plain"}),
    (gpu_append, {"impl": "triton", "form": "fused", "codec": "fp8"}),
    (gpu_prefill, {"impl": "triton", "mode": "forward", "given": 0}),
    (gpu_prefill, {"impl": "triton", "mode": "backward", "given": 0}),
]


@pytest.mark.parametrize(("module", "wanted"), CASES)
def test_the_gate_passes_what_is_timed(module, wanted) -> None:
    point = next(p for p in module.points() if wanted.items() <= p.items())
    module.verify(point)


def test_the_gate_sees_a_wrong_kernel(monkeypatch) -> None:
    point = next(p for p in gpu_decode.points() if p["impl"] == "triton" and p["H"] == 16)
    right = gpu_decode.mla_decode

    def wrong(*arguments, scale, **options):
        return right(*arguments, scale=0.9 * scale, **options)

    monkeypatch.setattr(gpu_decode, "mla_decode", wrong)
    with pytest.raises(GateError, match="triton at H=16"):
        gpu_decode.verify(point)
