"""Caches in files: bit for bit what was saved, or refused; an old file survives a crash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generator, poison_, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import CODECS, DTYPES, SEEDS

from mla.cache import CacheFull, DenseLatentCache, load_cache, save_cache
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.config import MLAConfig, RopeConfig

SIZES = ((24, 6), (7, 2), (5, 0))  # of layers 0, 1 and 2
# The folder of a test serves all drawn examples of it: each writes its own files anew.
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
in_one_folder = settings(suppress_health_check=CHECKS)


def config(C: int, R: int, **fields: Any) -> MLAConfig:
    return MLAConfig(
        hidden_size=8,
        num_attention_heads=2,
        kv_lora_rank=C,
        qk_nope_head_dim=4,
        qk_rope_head_dim=R,
        v_head_dim=4,
        **fields,
    )


def filled(
    counts: list[int],
    *,
    starts: list[int] | None = None,
    num_layers: int = 2,
    codec: Codec | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    seed: int = 0,
) -> DenseLatentCache:
    """A cache in poisoned storage after one step."""
    cache = DenseLatentCache(
        [config(*sizes) for sizes in SIZES[:num_layers]],
        batch_size=len(counts),
        max_length=max_length,
        codec=codec,
        dtype=dtype,
    )
    cache._make_room(counts)
    for rows in cache._rows:
        poison_(rows)
    step(cache, counts, seed, starts=starts)
    return cache


def step(
    cache: DenseLatentCache, counts: list[int], seed: int, *, starts: list[int] | None = None
) -> None:
    cache.reserve(counts, starts=starts)
    for layer, (C, R) in enumerate(SIZES[: cache.num_layers]):
        shape = (len(counts), max(counts))
        latent = randn(*shape, C, seed=seed + 2 * layer, dtype=cache.dtype)
        k_rope = randn(*shape, R, seed=seed + 2 * layer + 1, dtype=cache.dtype)
        cache.append(layer, latent, k_rope)


def bits(cache: DenseLatentCache) -> list[bytes]:
    """All that a query can see, as bytes, with the lengths and the left padding."""
    found = [repr((cache._host_lengths, cache._host_starts)).encode()]
    assert cache.lengths.tolist() == cache._host_lengths
    assert (cache.starts is None) == (not any(cache._host_starts))
    assert cache.starts is None or cache.starts.tolist() == cache._host_starts
    for layer in range(cache.num_layers):
        rows = cache.view(layer).rows
        for b, (begin, end) in enumerate(zip(cache._host_starts, cache._host_lengths, strict=True)):
            found.append(bytes(rows[b, begin:end].contiguous().flatten().view(torch.uint8)))
    return found


@in_one_folder
@given(
    data=st.data(),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    num_layers=st.integers(1, 3),
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    is_fixed=st.booleans(),
    seed=SEEDS,
)
def test_restores_every_bit_and_goes_on(
    data, counts, num_layers, codec, dtype, is_fixed, seed, tmp_path
):
    starts = data.draw(st.none() | st.tuples(*[st.integers(0, n) for n in counts]))
    cache = filled(
        counts,
        starts=None if starts is None else list(starts),
        num_layers=num_layers,
        codec=codec,
        dtype=dtype,
        max_length=20 if is_fixed else None,
        seed=seed,
    )
    before = bits(cache)
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", cache.configs)
    assert bits(cache) == before, "saving changed the cache"
    assert bits(restored) == before
    assert (restored.codec, restored.dtype) == (cache.codec, cache.dtype)
    assert restored.view(0).max_length == cache.view(0).max_length
    more = [data.draw(st.integers(0, 4)) for _ in counts]
    for one in (cache, restored):  # also the left padding of the next cold step is as free
        step(one, more, seed + 100)
    assert bits(restored) == bits(cache)


def test_a_file_has_the_used_positions_only(tmp_path):
    cache = filled([3, 0, 5], starts=[1, 0, 0], codec=Fp8Codec())
    save_cache(cache, tmp_path / "cache")
    tensors = load_file(tmp_path / "cache")
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        f"layers.{i}.rows": (7, Fp8Codec().row_width(*SIZES[i])) for i in (0, 1)
    }
    assert all(x.dtype == torch.uint8 for x in tensors.values())
    with safe_open(tmp_path / "cache", framework="pt") as stored:
        metadata = stored.metadata()
    header = json.loads(metadata["header"])
    assert (metadata["format"], metadata["version"]) == ("mla-cache", "1")
    assert (header["lengths"], header["starts"]) == ([3, 0, 5], [1, 0, 0])
    assert (header["codec"], header["layout"]) == (Fp8Codec().spec, "dense")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    """Bytes of a small file, its configs, and what it restores to."""
    cache = filled([2, 3], starts=[1, 0], codec=Int4Codec(group=16), num_layers=2)
    path = tmp_path_factory.mktemp("good") / "cache.safetensors"
    save_cache(cache, path)
    return path.read_bytes(), cache.configs, bits(cache)


@in_one_folder
@given(data=st.data())
def test_a_file_that_was_cut_is_refused(good_file, data, tmp_path):
    content, configs, _ = good_file
    path = tmp_path / "cut"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"load_cache: .*cut has "):
        load_cache(path, configs)


def check_altered(path: Path, content: bytes, good_file: Any) -> None:
    """Refused, or the altered byte was one that no reader looks at."""
    original, configs, expected = good_file
    path.write_bytes(content)
    if content == original:
        return
    try:
        restored = load_cache(path, configs)
    except ValueError as error:
        assert str(error).startswith("load_cache: ")
        return
    assert bits(restored) == expected


@settings(suppress_health_check=CHECKS, max_examples=150)
@given(data=st.data())
def test_a_changed_byte_is_noticed(good_file, data, tmp_path):
    content = bytearray(good_file[0])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    check_altered(tmp_path / "altered", bytes(content), good_file)


@in_one_folder
@given(data=st.data())
def test_inserted_removed_and_swapped_bytes_are_noticed(good_file, data, tmp_path):
    content = good_file[0]
    first, second = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
    extra = data.draw(st.binary(max_size=9))
    check_altered(tmp_path / "altered", content[:first] + extra + content[second:], good_file)
    check_altered(tmp_path / "altered", content + (extra or b"\0"), good_file)


def test_every_byte_of_the_rows_is_under_a_checksum(good_file, tmp_path):
    content = good_file[0]
    data_at = 8 + int.from_bytes(content[:8], "little")
    for at in range(data_at, len(content), 7):
        altered = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (tmp_path / "altered").write_bytes(altered)
        with pytest.raises(ValueError, match=r"has altered bytes in layers\.\d\.rows,"):
            load_cache(tmp_path / "altered", good_file[1])


def rewritten(path: Path, **changes: str) -> None:
    """The file at ``path`` with other metadata."""
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})


def signed(header: str) -> dict[str, str]:
    return {"header": header, "sha256": hashlib.sha256(header.encode()).hexdigest()}


def test_what_is_refused_by_name(tmp_path):
    path = tmp_path / "cache"
    cache = filled([2, 3], codec=Int8Codec())
    save_cache(cache, path)
    configs = list(cache.configs)
    wider = [configs[0], config(8, 2)]
    turned = [replace(configs[0], rope=RopeConfig(theta=5e5)), configs[1]]
    for argument, fact in (
        ({"config": wider}, "kv_lora_rank=7 in layer 1, expected 8 as config has"),
        ({"config": turned}, "rope={.*'theta': 10000.0.*} in layer 0, expected {.*500000.0.*}"),
        ({"config": configs[:1]}, "2 layers, expected 1 as config has"),
        ({"config": configs[0]}, "kv_lora_rank=7 in layer 1, expected 24"),
        ({"codec": Fp8Codec()}, "codec 'int8/128/16/0', expected 'fp8/128/16/0'"),
        ({"codec": Int8Codec(rope_bits=8)}, "codec 'int8/128/16/0', expected 'int8/128/8/0'"),
        ({"dtype": torch.bfloat16}, "dtype torch.float32, expected torch.bfloat16"),
    ):
        arguments = {"config": configs, **argument}
        with pytest.raises(ValueError, match=f"load_cache: {re.escape(str(path))} has {fact}"):
            load_cache(path, **arguments)
    with pytest.raises(CacheFull, match="max_length has value 2, expected at least 3"):
        load_cache(path, configs, max_length=2)
    assert load_cache(path, configs, max_length=7).capacity == 7
    assert load_cache(path, configs, codec=Int8Codec(), dtype=torch.float32).max_length == 3


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "cache"
    cache = filled([2])
    for change, fact in (
        ({"format": "pt"}, "format 'pt', expected 'mla-cache'"),
        ({"version": "2"}, "version '2', expected '1'"),
        ({"header": "{}"}, "an altered header, expected one that fits its checksum"),
        (signed('{"layout": "ring"}'), "layout 'ring', expected one of"),
        (signed('{"layout": "dense"}'), "no layers in its header, expected a list"),
    ):
        save_cache(cache, path)
        rewritten(path, **change)
        with pytest.raises(ValueError, match=f"has {fact}"):
            load_cache(path, cache.configs)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="format None"):
        load_cache(path, cache.configs)
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match=r"no complete tensors \("):
        load_cache(tmp_path / "text", cache.configs)
    with pytest.raises(ValueError, match="missing does not exist, expected a file of save_cache"):
        load_cache(tmp_path / "missing", cache.configs)
    with pytest.raises(ValueError, match="is a folder"):
        load_cache(tmp_path, cache.configs)


def test_one_config_serves_all_layers(tmp_path):
    cache = DenseLatentCache(config(24, 6), batch_size=1, num_layers=3, dtype=torch.float64)
    save_cache(cache, tmp_path / "cache")
    restored = load_cache(tmp_path / "cache", config(24, 6))
    assert (restored.num_layers, restored.max_length, restored.dtype) == (3, 0, torch.float64)


def test_nan_is_kept_with_its_payload(tmp_path):
    cache = filled([4], dtype=torch.bfloat16, num_layers=1)
    used = cache._rows[0][:, :4]
    used.view(torch.int16)[:] = torch.randint(
        -(2**15), 2**15, used.shape, generator=generator(0), dtype=torch.int16
    )
    used.view(torch.int16)[0, 0, :3] = torch.tensor([0x7FC1, -1, 0x7F81], dtype=torch.int16)
    save_cache(cache, tmp_path / "cache")
    assert bits(load_cache(tmp_path / "cache", cache.configs)) == bits(cache)


def test_a_step_that_is_not_finished_is_refused(tmp_path):
    cache = filled([2, 3])
    cache.reserve(1)
    cache.append(0, randn(2, 1, 24, seed=0), randn(2, 1, 6, seed=1))
    with pytest.raises(ShapeError, match=r"save_cache: cache has layers \[1\] without rows"):
        save_cache(cache, tmp_path / "cache")
    with pytest.raises(UnsupportedError, match="cache has type dict, expected"):
        save_cache({}, tmp_path / "cache")
    with pytest.raises(ValueError, match="nowhere does not exist, expected a folder"):
        save_cache(filled([1]), tmp_path / "nowhere" / "cache")
    with pytest.raises(ValueError, match="is a folder, expected the name of a file"):
        save_cache(filled([1]), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.chmod"])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = tmp_path / "cache"
    cache = filled([2, 3])
    save_cache(cache, path)
    old = path.read_bytes()

    def fail(*arguments: Any, **options: Any) -> None:
        if where.endswith("save_file"):
            Path(arguments[1]).write_bytes(old[: len(old) // 2])
        raise error

    step(cache, [1, 1], 7)
    with monkeypatch.context() as patched:
        patched.setattr(where, fail)
        with pytest.raises(type(error)):
            save_cache(cache, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path], "an unfinished file was left behind"
    save_cache(cache, path)
    assert load_cache(path, cache.configs).lengths.tolist() == [3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    cache = filled([2, 3])
    save_cache(cache, path)
    old = path.read_bytes()

    def die(tensors: Any, file: str, metadata: Any) -> None:
        Path(file).write_bytes(old[: len(old) // 2])
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr("safetensors.torch.save_file", die)
        save_cache(cache, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == old
    assert bits(load_cache(path, cache.configs)) == bits(cache)


def test_others_may_read_the_file(tmp_path):
    save_cache(filled([1], codec=PlainCodec()), tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o644
