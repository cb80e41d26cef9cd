"""The pool on a device: the same bits wherever pages lie, and captured graphs that follow it."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from layers import SMALL, inputs, make_layer
from test_paged_decode import same_wherever_it_lies

from mla import PagedLatentCache
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


@pytest.mark.cuda
def test_a_captured_layer_follows_the_pool_and_reserve_does_not_wait():
    layer = make_layer(SMALL, 3, torch.float32, impl="triton").to(DEVICE)
    pool = PagedLatentCache(SMALL, num_pages=60, page_size=4, dtype=torch.float32, device=DEVICE)
    batch = pool.batch([pool.allocate(), pool.allocate(), None], max_length=40)
    x = torch.zeros(3, 1, 20, device=DEVICE)
    with torch.no_grad():
        batch.reserve([5, 3, 0])
        layer(inputs(3, 5, 1, torch.float32).to(DEVICE), cache=batch)
        batch.reserve(1)
        layer(x, cache=batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        batch.reserve(1)
        with torch.cuda.graph(graph):
            captured = layer(x, cache=batch)
        graph.replay()  # what was recorded has not run yet
        for step in range(12):
            if step == 3:
                batch.select([pool.fork(batch.sequences[0]), None, batch.sequences[1]])
            if step == 6:
                batch.reorder([2, 1, 2])
            if step == 9:
                batch.truncate([4, 0, 7])
            sequences = [s for s in batch.sequences if s is not None]
            rows = [row for row, s in enumerate(batch.sequences) if s is not None]
            alone = pool.batch([pool.fork(s) for s in sequences])
            x.copy_(inputs(3, 1, 10 + step, torch.float32))
            torch.cuda.set_sync_debug_mode("error")
            try:
                batch.reserve(1)
                graph.replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            batch.commit()
            torch.testing.assert_close(captured[rows], layer(x[rows], cache=alone))
            pool.free(*(s for s in alone.sequences if s is not None))
            pool.check()
