"""The paged buffer as other engines read it: a plain transcription of the public layouts.

    16 bits   [pages, page_size, 1, 512 + 64]: the latent, then the rotated key
    fp8       [pages, page_size, 1, 656] bytes: 512 e4m3 values; 4 float32 scales, scale g for the
              values from 128 g on; 64 bfloat16 values of the rotated key, not scaled

Position t of a sequence lies in slot ``t % page_size`` of page ``table[t // page_size]``.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, poison_, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from test_cache import config
from torch import Tensor

from mla import PagedLatentCache, reference
from mla.codec import Fp8Codec, PlainCodec
from mla.integrations.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from mla.integrations.flashinfer import BatchMLAPagedAttentionWrapper
from mla.ops import mla_decode

C, R, Z = 512, 64, 4
ROW_BYTES = 656


def read_e4m3(byte: int) -> float:
    """1 sign, 4 exponent and 3 mantissa bits, bias 7; no infinity, one NaN in each half."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def read_bf16(low: int, high: int) -> float:
    """The upper half of a float32, little end first."""
    return float(struct.unpack("<f", bytes((0, 0, low, high)))[0])


def read_fp8_token(memory: bytes, token: int) -> list[float]:
    """The 512 + 64 values of one slot of a flat pool."""
    row = memory[token * ROW_BYTES : (token + 1) * ROW_BYTES]
    scales = struct.unpack("<4f", row[512:528])
    latent = [read_e4m3(byte) * scales[i // 128] for i, byte in enumerate(row[:512])]
    return latent + [read_bf16(row[i], row[i + 1]) for i in range(528, 656, 2)]


def write_fp8_token(values: list[float]) -> bytes:
    """A row as another engine may have written it: any scales, here not powers of two."""
    row = bytearray(ROW_BYTES)
    codes = {read_e4m3(byte): byte for byte in range(256)}
    finite = [code for code in codes if not math.isnan(code)]
    for group in range(4):
        part = values[128 * group : 128 * group + 128]
        scale = struct.unpack("<f", struct.pack("<f", max(map(abs, part)) / 300))[0]
        struct.pack_into("<f", row, 512 + 4 * group, scale)
        for i, value in enumerate(part, 128 * group):
            row[i] = codes[min(finite, key=lambda code: abs(code * scale - value))]
    for i, value in enumerate(values[512:]):
        row[528 + 2 * i : 530 + 2 * i] = struct.pack("<f", value)[2:]
    return bytes(row)


def tokens_of(table: list[int], length: int) -> list[int]:
    """Slots of the flat pool that hold positions 0 to ``length - 1``."""
    return [table[t // Z] * Z + t % Z for t in range(length)]


def filled(codec: Any, lengths: list[int], seed: int) -> tuple[PagedLatentCache, Any, Tensor]:
    """A pool with rows of these lengths in scattered pages, the batch, and what was appended."""
    pool = PagedLatentCache(
        config(C, R), num_pages=16, page_size=Z, codec=codec, dtype=torch.bfloat16
    )
    poison_(pool.rows(0))
    other = pool.allocate()
    batch = pool.batch([pool.allocate() for _ in lengths])
    new = randn(len(lengths), max(lengths), C + R, seed=seed, dtype=torch.bfloat16)
    new[..., :C] *= torch.logspace(-2, 1, 4).repeat_interleave(128)  # four scales that differ
    done = 0
    while done < max(lengths):  # one token at a time: pages of the rows alternate
        counts = [int(done < length) for length in lengths]
        batch.reserve(counts)
        batch.append(0, new[:, done : done + 1, :C], new[:, done : done + 1, C:])
        done += 1
        if done == 2:
            pool.batch([other]).reserve(1)
    return pool, batch, new


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=SEEDS)
def test_sixteen_bit_rows_lie_as_published(lengths, seed):
    pool, batch, new = filled(PlainCodec(), lengths, seed)
    public = pool.rows(0).unsqueeze(2)
    assert public.data_ptr() == pool.rows(0).data_ptr() == batch.view(0).rows.data_ptr()
    assert public.is_contiguous() and tuple(public.shape) == (16, Z, 1, C + R)
    assert public.dtype == torch.bfloat16
    flat = public.view(-1, C + R)
    for table, length, appended in zip(batch.page_table.tolist(), lengths, new, strict=True):
        assert torch.equal(flat[tokens_of(table, length)], appended[:length])


def exact(new: Tensor) -> Tensor:
    """What a row of 512 e4m3 and 64 bfloat16 values may lose at most, per value."""
    groups = new[:C].double().view(4, 128)
    scale = torch.exp2(torch.ceil(torch.log2((groups.abs().amax(1) / 448).clamp(min=1e-4))))
    loss = torch.maximum(groups.abs() / 16, scale[:, None] * 2.0**-10)  # half of the last bit
    return torch.cat([loss.flatten(), torch.zeros(R, dtype=torch.float64)])


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=2), seed=SEEDS)
def test_fp8_rows_are_the_published_656_bytes(lengths, seed):
    pool, batch, new = filled(Fp8Codec(), lengths, seed)
    public = pool.rows(0).unsqueeze(2)
    assert tuple(public.shape) == (16, Z, 1, ROW_BYTES) and public.is_contiguous()
    assert public.data_ptr() == pool.rows(0).data_ptr()
    memory = bytes(public.flatten())
    for table, length, appended in zip(batch.page_table.tolist(), lengths, new, strict=True):
        for token, row in zip(tokens_of(table, length), appended, strict=False):
            read = torch.tensor(read_fp8_token(memory, token), dtype=torch.float64)
            assert ((read - row.double()).abs() <= exact(row)).all()


def oracle(rows: Tensor, q: Tensor, lengths: list[int]) -> reference.Attention:
    """Attention of ``q [B, 1, H, C+R]`` to ``rows [B, S, C+R]`` in the dtype of ``rows``."""
    q = q.to(rows.dtype)
    parts = (q[..., :C], q[..., C:], rows[..., :C], rows[..., C:])
    return reference.absorbed_attention(*parts, torch.tensor(lengths), scale=0.05)


@pytest.mark.parametrize("codec", [PlainCodec(), Fp8Codec()], ids=lambda codec: codec.kind)
def test_the_ops_and_both_faces_read_rows_that_another_engine_wrote(codec):
    lengths, H = [6, 1, 3], 3
    pool, batch, new = filled(codec, lengths, seed=3)
    rows = torch.full((3, 6, C + R), math.nan, dtype=torch.float64)
    flat = pool.rows(0).view(16 * Z, -1)
    for b, (table, length) in enumerate(zip(batch.page_table.tolist(), lengths, strict=True)):
        for t, token in enumerate(tokens_of(table, length)):
            values = (new[b, t].float() * -1.5).bfloat16()  # other rows than those appended
            if codec.kind == "fp8":
                written = write_fp8_token(values.tolist())
                flat[token] = torch.tensor(list(written), dtype=torch.uint8)
                rows[b, t] = torch.tensor(read_fp8_token(written, 0), dtype=torch.float64)
            else:
                flat[token] = values
                rows[b, t] = values.double()
    q = randn(3, 1, H, C + R, seed=4, dtype=torch.bfloat16)
    wanted, plain = oracle(rows, q, lengths), oracle(rows.bfloat16(), q, lengths)
    view = batch.view(0)

    found = {"op": mla_decode(q[..., :C], q[..., C:], view, scale=0.05).out}
    found["flash_mla"], _ = flash_mla_with_kvcache(
        q,
        pool.rows(0).unsqueeze(2),
        batch.page_table,
        batch.lengths,
        C,
        *get_mla_metadata(batch.lengths, H, 1),
        softmax_scale=0.05,
        is_fp8_kvcache=codec.kind == "fp8",
    )
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(0))
    pages = [-(-length // Z) for length in lengths]
    wrapper.plan(
        torch.arange(4, dtype=torch.int32),
        torch.tensor([0, pages[0], pages[0] + pages[1], sum(pages)], dtype=torch.int32),
        torch.cat([batch.page_table[b, :n] for b, n in enumerate(pages)]),
        batch.lengths,
        *(H, C, R, Z, True, 0.05, torch.bfloat16, pool.rows(0).dtype),
    )
    caches = (pool.rows(0), None)
    if codec.kind == "plain":
        caches = (pool.rows(0)[..., :C], pool.rows(0)[..., C:])
    found["flashinfer"] = wrapper.run(q[:, 0, :, :C], q[:, 0, :, C:], *caches)[:, None]
    for name, out in found.items():
        assert_within_budget(out, wanted.out, plain.out, name)
