"""Pools in files: the same rows, sharing and findable pages as before, or refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import poison_, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import CODECS, SEEDS
from test_cache import config

from mla.cache import CacheFull, PagedLatentCache, load_cache, save_cache
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Codec, Fp8Codec, Int4Codec

SIZES = ((24, 6), (7, 2))  # of layers 0 and 1
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def pool_of(**options: Any) -> PagedLatentCache:
    """A pool of poisoned pages."""
    defaults: dict[str, Any] = {"num_pages": 60, "page_size": 4, "dtype": torch.float32}
    pool = PagedLatentCache([config(*sizes) for sizes in SIZES], **{**defaults, **options})
    for rows in pool._rows:
        poison_(rows)
    return pool


def step(pool: PagedLatentCache, sequence: int, count: int, seed: int, **options: Any) -> None:
    batch = pool.batch([sequence])
    batch.reserve([count], **options)
    for layer, (C, R) in enumerate(SIZES):
        latent = randn(1, count, C, seed=seed + layer, dtype=pool.dtype)
        batch.append(layer, latent, randn(1, count, R, seed=seed + 2 + layer, dtype=pool.dtype))


def filled(pool: PagedLatentCache, ids: list[int], seed: int = 0, **options: Any) -> int:
    """A sequence of these tokens."""
    sequence = pool.allocate(ids, **options)
    step(pool, sequence, len(ids) - pool.length(sequence), seed)
    return sequence


def bits(pool: PagedLatentCache, sequence: int) -> list[bytes]:
    """All rows of a sequence as they are stored, position after position."""
    pages = torch.tensor(pool._records[sequence].pages, dtype=torch.int64)
    return [
        bytes(rows[pages].flatten(0, 1)[: pool.length(sequence)].flatten().view(torch.uint8))
        for rows in pool._rows
    ]


def state(pool: PagedLatentCache) -> Any:
    """All that is promised to come back; pages by the order of their first use."""
    pool.check()
    pool._settle()
    number: dict[int, int] = {}
    records = pool._records.values()
    tables = [[number.setdefault(page, len(number)) for page in r.pages] for r in records]
    known = [(r.root, r.length, r.written, r.token_ids) for r in records]
    return tables, known, [bits(pool, sequence) for sequence in pool.sequences]


@st.composite
def pools(draw: Any) -> PagedLatentCache:
    """A pool after some allocations, steps, forks, rollbacks and frees."""
    pool = pool_of(
        page_size=draw(st.sampled_from([1, 3, 4])),
        codec=draw(st.sampled_from(CODECS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        scrub_on_free=draw(st.booleans()),
    )
    for _ in range(draw(st.integers(0, 8))):
        seed = draw(SEEDS)
        action = draw(st.sampled_from(["allocate", "step", "fork", "truncate", "free"]))
        if action == "allocate":
            ids = draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            filled(pool, ids, seed, salt=draw(st.sampled_from(["", "b"])))
        elif pool.sequences:
            sequence = draw(st.sampled_from(pool.sequences))
            if action == "step":
                count = draw(st.integers(0, 4))
                ids = [draw(st.none() | st.just(list(range(count))))]
                step(pool, sequence, count, seed, token_ids=ids)
            elif action == "fork":
                pool.fork(sequence)
            elif action == "truncate":
                pool.truncate(sequence, draw(st.integers(0, pool.length(sequence))))
            else:
                pool.free(sequence)
    return pool


@settings(suppress_health_check=CHECKS)
@given(pool=pools(), data=st.data())
def test_restores_every_bit_and_all_sharing_and_goes_on(pool, data, tmp_path):
    path = tmp_path / "pool"
    before = state(pool)
    save_cache(pool, path)
    assert state(pool) == before, "saving changed the pool"
    restored = load_cache(path, pool.configs)
    assert state(restored) == before
    for record in restored._records.values():  # under these tokens, if not the same page
        assert all(restored._pages.find(digest) is not None for digest in record.digests)
    assert (restored.codec, restored.dtype, restored.num_pages, restored.page_size) == (
        pool.codec,
        pool.dtype,
        pool.num_pages,
        pool.page_size,
    )
    assert restored.scrub_on_free == pool.scrub_on_free
    assert restored._pages.num_kept == 0
    assert not set(restored.sequences) & set(pool.sequences), "ids are never used twice"
    for index in range(len(pool.sequences)):  # also writes into shared pages
        count, seed = data.draw(st.integers(0, 5)), data.draw(SEEDS)
        for one in (pool, restored):
            step(one, one.sequences[index], count, seed)
    assert state(restored) == state(pool)


def test_shared_pages_are_stored_once_and_only_as_far_as_they_are_used(tmp_path):
    pool = pool_of(codec=Fp8Codec())
    first = filled(pool, list(range(9)))
    filled(pool, list(range(6)))  # shares one page, has two tokens in another
    pool.fork(first)
    pool.free(filled(pool, [7] * 9))  # kept, nobody's
    save_cache(pool, tmp_path / "pool")
    tensors = load_file(tmp_path / "pool")
    used = 9 + 2
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        "layers.0.rows": (used, Fp8Codec().row_width(*SIZES[0])),
        "layers.1.rows": (used, Fp8Codec().row_width(*SIZES[1])),
        "tables.pages": (3 + 2 + 3,),
        "tables.token_ids": (9 + 6 + 9,),
    }
    assert tensors["tables.pages"].tolist() == [0, 1, 2, 0, 3, 0, 1, 2]


def test_a_shared_page_is_stored_as_far_as_its_longest_user_has_it(tmp_path):
    for longest in (0, 1):
        pool = pool_of()
        filled(pool, list(range(7)))
        pool.fork(pool.sequences[0])
        pool.truncate(pool.sequences[1 - longest], 5)
        save_cache(pool, tmp_path / "pool")
        assert load_file(tmp_path / "pool")["layers.0.rows"].shape[0] == 7
        assert state(load_cache(tmp_path / "pool", pool.configs)) == state(pool)


def test_tokens_find_the_same_pages_after_loading(tmp_path):
    pool = pool_of()
    filled(pool, list(range(9)), salt="adapter")
    save_cache(pool, tmp_path / "pool")
    restored = load_cache(tmp_path / "pool", pool.configs)
    assert restored.length(restored.allocate(list(range(9)), salt="adapter")) == 8
    assert restored.length(restored.allocate(list(range(9)))) == 0
    assert restored.length(restored.allocate([0, 1, 2, 3, 9, 9], salt="adapter")) == 4


def test_another_number_of_pages(tmp_path):
    pool = pool_of()
    filled(pool, list(range(9)))
    filled(pool, list(range(9)))  # shares two full pages
    save_cache(pool, tmp_path / "pool")
    restored = load_cache(tmp_path / "pool", pool.configs, num_pages=4)
    assert (restored.num_pages, restored.num_free_pages) == (4, 0)
    assert state(restored) == state(pool)
    with pytest.raises(CacheFull, match="num_pages has value 3, expected at least the 4 pages"):
        load_cache(tmp_path / "pool", pool.configs, num_pages=3)
    with pytest.raises(ShapeError, match=r"max_length has value 9, expected None: .* paged cache"):
        load_cache(tmp_path / "pool", pool.configs, max_length=9)


def test_rows_that_are_not_written_are_refused(tmp_path):
    pool = pool_of()
    sequence = filled(pool, list(range(5)))
    batch = pool.batch([sequence])
    batch.reserve(2)
    message = rf"save_cache: sequence {sequence} has 5 written positions of 7, expected a finished"
    with pytest.raises(ShapeError, match=message):
        save_cache(pool, tmp_path / "pool")
    batch.commit()  # a replayed graph wrote them
    save_cache(pool, tmp_path / "pool")
    batch.reserve(1)
    batch.truncate([7])
    save_cache(pool, tmp_path / "pool")
    with pytest.raises(UnsupportedError, match="cache has type PagedBatch, expected a Dense"):
        save_cache(batch, tmp_path / "other")
    assert list(tmp_path.iterdir()) == [tmp_path / "pool"]


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    """Bytes of a small file, its configs, and what it restores to."""
    codec: Codec = Int4Codec(group=16)
    pool = pool_of(codec=codec, num_pages=6)
    pool.fork(filled(pool, [1, 2, 3, 4, 5]))
    path = tmp_path_factory.mktemp("good") / "pool"
    save_cache(pool, path)
    return path.read_bytes(), pool.configs, state(pool)


@settings(suppress_health_check=CHECKS, max_examples=100)
@given(data=st.data())
def test_a_changed_byte_or_a_cut_is_noticed(good_file, data, tmp_path):
    original, configs, expected = good_file
    content = bytearray(original)
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "altered").write_bytes(content)
    try:
        restored = load_cache(tmp_path / "altered", configs)
    except ValueError as error:
        assert str(error).startswith("load_cache: ")
    else:  # a byte that no reader looks at
        assert len(content) == len(original) and state(restored) == expected


def rewrite(path: Path, tables: dict[str, torch.Tensor], **fields: Any) -> None:
    """Other tables and fields, under checksums that fit."""
    tensors = {**load_file(path), **tables}
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    header = {**json.loads(metadata["header"]), **fields}
    header["sha256"] = {
        name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
        for name, x in tensors.items()
    }
    metadata["header"] = json.dumps(header)
    metadata["sha256"] = hashlib.sha256(metadata["header"].encode()).hexdigest()
    save_file(tensors, path, metadata=metadata)


def test_tables_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "pool"
    pool = pool_of()
    filled(pool, [1, 2, 3, 4, 5])
    for tables, fields, message in (
        ({}, {"page_size": 5}, "the tables have 2 pages and 5 token ids, expected 1 and 5"),
        ({"tables.token_ids": torch.tensor([1, 2])}, {}, "2 pages and 2 token ids, expected 2"),
        ({"tables.pages": torch.tensor([0, 1])}, {}, "torch.int64 at tables.pages, expected"),
        ({"tables.pages": torch.tensor([0, 2], dtype=torch.int32)}, {}, "pages 0 to 2, expected 0"),
        ({"tables.pages": torch.tensor([-1, 0], dtype=torch.int32)}, {}, "pages -1 to 0, expected"),
        ({"layers.1.rows": torch.zeros(4, 9)}, {}, "(4, 9) torch.float32 at layers.1.rows"),
        ({}, {"roots": None}, "no roots in its header, expected a list"),
    ):
        save_cache(pool, path)
        rewrite(path, tables, **fields)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_cache(path, pool.configs)
