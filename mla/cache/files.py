"""Caches as files: one safetensors file a cache, written whole or not at all, checked before use.

    metadata   format, version, header (JSON), sha256 of the header
    tensors    layers.<i>.rows   [used positions, W] as they are stored, sequence after sequence

The header says what the rows are: of each layer the fields of `MLAConfig` that a cached row depends
on, codec, dtype, layout, lengths, starts and the sha256 of every tensor. Only visible positions are
stored, in the bytes of the cache's own rows: nothing is decoded, so that restoring is bit-exact.
Nothing in a file is executed or unpickled. It needs the package safetensors.

Dims: B sequences, W stored row width.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.cache.dense import DenseLatentCache
from mla.checks import FLOAT_DTYPES, ShapeError, UnsupportedError
from mla.codec import Codec, codec_from_spec
from mla.config import MLAConfig

FORMAT = "mla-cache"
VERSION = "1"
# What a stored row depends on, besides the weights: its widths and how its two parts were made.
ROW_FIELDS = (
    "kv_lora_rank",
    "qk_rope_head_dim",
    "rope",
    "latent_norm",
    "latent_norm_eps",
    "latent_scale",
)
HEADER = {
    "layers": list,
    "codec": str,
    "dtype": str,
    "lengths": list,
    "starts": list,
    "sha256": dict,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def save_cache(cache: DenseLatentCache, path: Path | str) -> None:
    """Write what ``cache`` holds to one file, complete under its name or not at all.

    A file at ``path`` is replaced, in one step. The used rows are copied to host memory first.

    Args:
        cache: between two steps, every reserved position written; it may be empty.
        path: by custom ``*.safetensors``; its folder must exist.

    Raises:
        ShapeError: a layer has not appended its rows of the current step.
        UnsupportedError: there is no file format for this type of cache.
        ValueError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if not isinstance(cache, DenseLatentCache):
        raise UnsupportedError(
            f"save_cache: cache has type {type(cache).__name__}, expected a DenseLatentCache"
        )
    unwritten = [layer for layer, is_pending in enumerate(cache._pending) if is_pending]
    if unwritten:
        raise ShapeError(
            f"save_cache: cache has layers {unwritten} without rows for the reserved positions, "
            "expected a finished step"
        )
    if not path.parent.is_dir():
        raise ValueError(f"save_cache: {path.parent} does not exist, expected a folder")
    tensors = {
        _rows_name(layer): _used_rows(cache, layer).cpu() for layer in range(cache.num_layers)
    }
    header = json.dumps(
        {
            "layout": "dense",
            "layers": [_row_values(config) for config in cache.configs],
            "codec": cache.codec.spec,
            "dtype": str(cache.dtype).removeprefix("torch."),
            "max_length": cache.capacity if cache._is_fixed else None,
            "lengths": cache._host_lengths,
            "starts": cache._host_starts,
            "sha256": {name: _digest(tensor) for name, tensor in tensors.items()},
        }
    )
    _write(path, tensors, header)


def load_cache(
    path: Path | str,
    config: MLAConfig | Sequence[MLAConfig],
    *,
    codec: Codec | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> DenseLatentCache:
    """A new cache with what `save_cache` wrote, checked whole before it is handed over.

    Every byte that carries meaning is under a checksum: a file that was cut or altered is refused.

    Args:
        path: a file of `save_cache`.
        config: of all layers, or a sequence with one for each layer. Compared with the file in all
            that a cached row depends on: C, R, rope and what is done to the latent.
        codec, dtype: what the rows are expected to be; None: what the file says.
        max_length: capacity in positions; None: as it was saved, fixed or growing.
        device: of the new cache.

    Returns:
        A cache with the lengths, left padding and rows of the saved one; positions that no query
        can see are not restored.

    Raises:
        ValueError: not such a file, of another version, altered, or of another config, codec or
            dtype; the message names the fact.
        CacheFull: the rows are longer than ``max_length``.
    """
    path = Path(path)
    with _opened(path) as stored:
        header = _read_header(path, stored.metadata())
        configs = _check_config(path, header, config)
        lengths, starts = header["lengths"], header["starts"]
        cache = DenseLatentCache(
            configs,
            batch_size=len(lengths),
            max_length=header["max_length"] if max_length is None else max_length,
            codec=_check_codec(path, header, codec),
            device=device,
            dtype=_check_dtype(path, header, dtype),
        )
        cache._make_room(lengths)
        for layer, rows in enumerate(cache._rows):
            used = _read_rows(path, stored, layer, header, rows)
            for b, begin, end in _runs(lengths, starts):
                rows[b, begin:end] = used[: end - begin]
                used = used[end - begin :]
    cache._set_lengths(lengths)
    cache._set_starts(starts)
    return cache


def _problem(path: Path, fact: str, expected: str) -> ValueError:
    return ValueError(f"load_cache: {path} has {fact}, expected {expected}")


def _rows_name(layer: int) -> str:
    return f"layers.{layer}.rows"


def _row_values(config: MLAConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {name: values[name] for name in ROW_FIELDS}


def _runs(lengths: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(row, first, end) of the visible positions of each sequence."""
    for b, (begin, end) in enumerate(zip(starts, lengths, strict=True)):
        yield b, begin, end


def _used_rows(cache: DenseLatentCache, layer: int) -> Tensor:
    """``[used positions, W]`` of one layer, sequence after sequence."""
    rows = cache._rows[layer]
    runs = _runs(cache._host_lengths, cache._host_starts)
    return torch.cat([rows[b, begin:end] for b, begin, end in runs])


def _digest(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor in host memory; needs no NumPy."""
    tensor = tensor.contiguous()
    content = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], header: str) -> None:
    """A new file beside ``path``, which then takes its name."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "header": header,
        "sha256": hashlib.sha256(header.encode()).hexdigest(),
    }
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        save_file(tensors, unfinished, metadata=metadata)
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.chmod(0o644)  # mkstemp hides what it makes from others
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _opened(path: Path) -> Any:
    """The open file; what is not safetensors is refused with the reason."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        fact = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"load_cache: {path} {fact}, expected a file of save_cache")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        fact = f"no complete tensors ({error})"
        raise _problem(path, fact, "a file as save_cache wrote it") from None


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """The header, its checksum compared, its lists of the right form."""
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        fact = f"format {metadata.get('format')!r}"
        raise _problem(path, fact, f"{FORMAT!r}: it is not a file of save_cache")
    if metadata.get("version") != VERSION:
        raise _problem(path, f"version {metadata.get('version')!r}", f"{VERSION!r}")
    text = metadata.get("header", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise _problem(path, "an altered header", "one that fits its checksum")
    header: dict[str, Any] = json.loads(text)
    if header.get("layout") != "dense":
        raise _problem(path, f"layout {header.get('layout')!r}", "'dense'")
    for name, kind in HEADER.items():
        if not isinstance(header.get(name), kind):
            raise _problem(path, f"no {name} in its header", f"a {kind.__name__}")
    return header


def _check_config(
    path: Path, header: dict[str, Any], config: MLAConfig | Sequence[MLAConfig]
) -> list[MLAConfig]:
    """One config for each layer of the file, or ValueError with the first field that differs."""
    layers = header["layers"]
    configs = [config] * len(layers) if isinstance(config, MLAConfig) else list(config)
    if len(configs) != len(layers):
        raise _problem(path, f"{len(layers)} layers", f"{len(configs)} as config has")
    for layer, (stored, given) in enumerate(zip(layers, configs, strict=True)):
        for name, value in _row_values(given).items():
            if stored.get(name) != value:
                fact = f"{name}={stored.get(name)} in layer {layer}"
                raise _problem(path, fact, f"{value} as config has")
    return configs


def _check_codec(path: Path, header: dict[str, Any], codec: Codec | None) -> Codec:
    stored = codec_from_spec(header["codec"])
    if codec is not None and codec != stored:
        raise _problem(path, f"codec {stored.spec!r}", f"{codec.spec!r} as codec says")
    return stored


def _check_dtype(path: Path, header: dict[str, Any], dtype: torch.dtype | None) -> torch.dtype:
    stored = DTYPES.get(header["dtype"])
    if stored is None:
        raise _problem(path, f"dtype {header['dtype']!r}", f"one of {list(DTYPES)}")
    if dtype is not None and dtype != stored:
        raise _problem(path, f"dtype {stored}", f"{dtype} as dtype says")
    return stored


def _read_rows(path: Path, stored: Any, layer: int, header: dict[str, Any], like: Tensor) -> Tensor:
    """``[used positions, W]`` of one layer on the device of ``like [B, Z, W]``.

    Copied out of the file before the checksum is compared, so that what was checked is used.
    """
    name = _rows_name(layer)
    if name not in stored.keys():  # noqa: SIM118 - a file, not a dict
        raise _problem(path, f"no tensor {name}", "one for each layer")
    rows: Tensor = stored.get_tensor(name).clone()
    expected = (sum(header["lengths"]) - sum(header["starts"]), like.shape[2])
    if tuple(rows.shape) != expected or rows.dtype != like.dtype:
        fact = f"{tuple(rows.shape)} {rows.dtype} at {name}"
        raise _problem(path, fact, f"{expected} {like.dtype}")
    if _digest(rows) != header["sha256"].get(name):
        raise _problem(path, f"altered bytes in {name}", "those that fit its checksum")
    return rows.to(like.device)
