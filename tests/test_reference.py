"""The oracle itself, against PyTorch's own attention and against loops over single numbers."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch.nn import functional as F

from mla import reference

F64 = torch.float64
WIDTHS = st.fixed_dictionaries(
    {
        "H": st.sampled_from([1, 3, 9]),
        "C": st.sampled_from([1, 5, 24]),
        "N": st.sampled_from([0, 3, 8]),
        "R": st.sampled_from([0, 2, 6]),
        "V": st.sampled_from([1, 4, 13]),
        "seed": SEEDS,
    }
)


def tensors(H, C, N, R, V, seed, *, B=2, L=4, S=7):
    shapes = [(B, L, H, N + R), (B, S, C), (B, S, R), (H * (N + V), C)]
    return [randn(*shape, seed=seed + i, dtype=F64) for i, shape in enumerate(shapes)]


@given(
    L=st.integers(1, 5),
    S=st.integers(1, 7),
    causal=st.booleans(),
    data=st.data(),
)
def test_visible_keys_one_by_one(L, S, causal, data):
    rows = data.draw(st.integers(1, 3))
    draw = data.draw
    lengths = [draw(st.integers(0, S)) for _ in range(rows)]
    starts = [draw(st.integers(0, n)) for n in lengths]
    counts = [draw(st.integers(0, L)) for _ in range(rows)]
    seen = reference.visible_keys(
        L,
        S,
        torch.tensor(lengths),
        starts=torch.tensor(starts),
        query_lengths=torch.tensor(counts),
        causal=causal,
    )
    for b in range(rows):
        for i in range(L):
            position = lengths[b] - counts[b] + i
            for key in range(S):
                expected = (
                    i < counts[b]
                    and starts[b] <= key < lengths[b]
                    and (key <= position or not causal)
                )
                assert seen[b, i, key] == expected


@given(widths=WIDTHS, causal=st.booleans())
def test_expanded_attention_is_that_of_pytorch(widths, causal):
    query, latent, k_rope, weight = tensors(**widths)
    H, N, V = widths["H"], widths["N"], widths["V"]
    if N + widths["R"] == 0:
        return
    kv = F.linear(latent, weight).unflatten(-1, (H, N + V))
    keys = torch.cat([kv[..., :N], k_rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    mask = torch.ones(4, 7, dtype=torch.bool).tril(7 - 4) if causal else None
    expected = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        kv[..., N:].transpose(1, 2),
        attn_mask=mask,
        scale=0.3,
    )
    out, lse = reference.expanded_attention(
        query, latent, k_rope, weight, num_heads=H, value_dim=V, scale=0.3, causal=causal
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = 0.3 * torch.einsum("blhd,bshd->blhs", query, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@given(widths=WIDTHS, data=st.data())
def test_absorbed_attention_is_expanded_attention(widths, data):
    """W_UK moved onto the queries and W_UV onto the output; ragged, padded on the left."""
    query, latent, k_rope, weight = tensors(**widths)
    H, N, V = widths["H"], widths["N"], widths["V"]
    lengths = torch.tensor([data.draw(st.integers(0, 7)) for _ in range(2)])
    starts = torch.tensor([data.draw(st.integers(0, int(n))) for n in lengths])
    counts = torch.tensor([data.draw(st.integers(0, 4)) for _ in range(2)])
    w_uk, w_uv = weight.view(H, N + V, -1).split([N, V], dim=1)
    q_nope, q_rope = query.split([N, widths["R"]], dim=-1)
    absorbed = reference.absorbed_attention(
        torch.einsum("blhn,hnc->blhc", q_nope, w_uk),
        q_rope,
        latent,
        k_rope,
        lengths,
        scale=0.3,
        starts=starts,
        query_lengths=counts,
    )
    expanded = reference.expanded_attention(
        query,
        latent,
        k_rope,
        weight,
        num_heads=H,
        value_dim=V,
        scale=0.3,
        key_starts=starts,
        key_lengths=lengths,
        query_lengths=counts,
    )
    values = torch.einsum("blhc,hvc->blhv", absorbed.out, w_uv)
    torch.testing.assert_close(values, expanded.out)
    torch.testing.assert_close(absorbed.lse, expanded.lse)


def test_nan_in_unseen_keys_is_inert_and_empty_rows_are_zero():
    query, latent, k_rope, weight = tensors(3, 5, 3, 2, 4, 0)
    lengths, starts = torch.tensor([5, 0]), torch.tensor([1, 0])
    clean = reference.expanded_attention(
        query, latent, k_rope, weight, num_heads=3, value_dim=4, scale=0.3,
        key_lengths=lengths, key_starts=starts,
    )  # fmt: skip
    latent[0, 5:] = latent[0, :1] = k_rope[0, 5:] = latent[1] = float("nan")
    dirty = reference.expanded_attention(
        query, latent, k_rope, weight, num_heads=3, value_dim=4, scale=0.3,
        key_lengths=lengths, key_starts=starts,
    )  # fmt: skip
    assert torch.equal(clean.out, dirty.out) and torch.equal(clean.lse, dirty.lse)
    assert (dirty.out[1] == 0).all() and (dirty.lse[1] == -math.inf).all()
    assert dirty.out[0].isfinite().all()


@given(widths=WIDTHS, cut=st.integers(0, 7))
def test_merged_halves_are_the_whole(widths, cut):
    query, latent, k_rope, weight = tensors(**widths)
    options = {"num_heads": widths["H"], "value_dim": widths["V"], "scale": 0.3, "causal": False}
    whole = reference.expanded_attention(query, latent, k_rope, weight, **options)
    parts = [
        reference.expanded_attention(
            query, latent, k_rope, weight, **options,
            key_starts=torch.tensor([begin] * 2), key_lengths=torch.tensor([end] * 2),
        )
        for begin, end in ((0, cut), (cut, 7))
    ]  # fmt: skip
    merged = reference.merge_partials(*(torch.stack(x) for x in zip(*parts, strict=True)))
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm_is_that_of_pytorch(has_weight):
    x, weight = randn(3, 10, seed=0, dtype=F64), randn(10, seed=1, dtype=F64)
    weight = weight if has_weight else None
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-3), F.rms_norm(x, (10,), weight, 1e-3)
    )


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [("interleaved", [(0, 1), (2, 3), (4, 5)]), ("half", [(0, 3), (1, 4), (2, 5)])],
)
def test_rotation_turns_each_pair_by_its_angle(pairing, pairs):
    x, angles = randn(6, seed=0, dtype=F64), randn(3, seed=1, dtype=F64)
    turned = reference.rotate(x, angles, pairing)
    for angle, (i, j) in zip(angles.tolist(), pairs, strict=True):
        rotation = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64
        )
        torch.testing.assert_close(turned[[i, j]], rotation @ x[[i, j]])
    assert torch.equal(reference.rotate(x, angles, "none"), x)


def test_every_e4m3_byte():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    actual = torch.tensor([reference._e4m3(byte) for byte in range(256)], dtype=F64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_hadamard_is_orthonormal_and_of_one_magnitude(size):
    matrix = reference.hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=F64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.equal(matrix, matrix.T)


def test_rows_written_by_hand():
    """C=5 and R=2 in 48 bytes: values, one scale at 16, rope at 32."""
    rope = struct.pack("<HH", 0x3FC0, 0xC000)  # bfloat16 1.5 and -2
    pad = bytes(11)
    int8 = struct.pack("<5b", 1, -2, 127, -127, 0) + pad + struct.pack("<f", 0.5) + bytes(12)
    options = {"group": 128, "rope_bits": 16, "rotation": False}
    assert reference.decode_row(int8 + rope + bytes(12), "int8", 5, 2, **options) == (
        [0.5, -1.0, 63.5, -63.5, 0.0],
        [1.5, -2.0],
    )
    fp8 = bytes([0x38, 0xB8, 0x01, 0x7E, 0x00]) + pad + struct.pack("<f", 2.0) + bytes(12)
    assert reference.decode_row(fp8 + rope + bytes(12), "fp8", 5, 2, **options) == (
        [2.0, -2.0, 2.0**-8, 896.0, 0.0],
        [1.5, -2.0],
    )
    int4 = bytes([0xF1, 0x89, 0x0C]) + bytes(13) + struct.pack("<ee", 0.25, 2.0) + bytes(12)
    eight = {"group": 64, "rope_bits": 8, "rotation": False}
    assert reference.decode_row(
        int4 + struct.pack("<2b", 3, -4) + bytes(14), "int4", 5, 2, **eight
    ) == (
        [-1.75, 1.75, 0.25, 0.0, 1.0],
        [6.0, -8.0],
    )
