"""The Triton decode gives a sequence the same bits wherever its pages lie in the pool."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from test_paged_decode import same_wherever_it_lies

from mla.codec import Int4Codec, PlainCodec

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [(PlainCodec(), torch.float32), (Int4Codec(), torch.bfloat16)],
    ids=["plain", "int4"],
)
def test_output_is_the_same_wherever_the_pages_lie(codec, dtype):
    same_wherever_it_lies(
        "triton",
        True,
        DEVICE,
        length=22,
        page_size=3,
        codec=codec,
        dtype=dtype,
        num_heads=3,
        seed=4,
    )
