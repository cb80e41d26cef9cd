"""Caches as files: one safetensors file a cache, written whole or not at all, checked before use.

    metadata   format, version, header (JSON), sha256 of the header
    tensors    layers.<i>.rows   [U, W] as they are stored, see `mla.cache.stored`
               tables.<name>     of a paged cache: pages and token ids of its sequences

The header says what the rows are: of each layer the fields of `MLAConfig` that a cached row depends
on, codec, dtype, layout, lengths, and the sha256 of every tensor. Only positions in use are stored,
in the bytes of the cache's own rows: nothing is decoded, so that restoring is bit-exact. Nothing in
a file is executed or unpickled. It needs the package safetensors.

Dims: U stored positions, W stored row width.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.cache.dense import DenseLatentCache
from mla.cache.paged import PagedLatentCache
from mla.cache.stored import (
    FIELDS,
    TABLES,
    dense_state,
    paged_state,
    places,
    restored_dense,
    restored_paged,
)
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
HEADER: dict[str, type] = {"layers": list, "codec": str, "dtype": str, "sha256": dict}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def save_cache(cache: DenseLatentCache | PagedLatentCache, path: Path | str) -> None:
    """Write what ``cache`` holds to one file, complete under its name or not at all.

    A file at ``path`` is replaced, in one step. The used rows are copied to host memory first. Of a
    pool all sequences are written, a shared page once; pages that are only kept to be found again
    are not.

    Args:
        cache: between two steps, every reserved position written; it may be empty.
        path: by custom ``*.safetensors``; its folder must exist.

    Raises:
        ShapeError: rows of the current step are missing.
        UnsupportedError: there is no file format for this type of cache.
        ValueError: the folder of ``path`` does not exist, or ``path`` is one.
    """
    path = Path(path)
    if isinstance(cache, PagedLatentCache):
        layout, state = "paged", paged_state(cache)
    elif isinstance(cache, DenseLatentCache):
        layout, state = "dense", dense_state(cache)
    else:
        raise UnsupportedError(
            f"save_cache: cache has type {type(cache).__name__}, expected a DenseLatentCache or a "
            "PagedLatentCache"
        )
    if not path.parent.is_dir():
        raise ValueError(f"save_cache: {path.parent} does not exist, expected a folder")
    if path.is_dir():
        raise ValueError(f"save_cache: {path} is a folder, expected the name of a file")
    page, slot = (x.to(cache.device) for x in places(state.runs))
    tensors = {
        **{_rows_name(layer): rows[page, slot].cpu() for layer, rows in enumerate(cache._rows)},
        **{_table_name(name): table for name, table in state.tables.items()},
    }
    header = {
        "layout": layout,
        "layers": [_row_values(config) for config in cache.configs],
        "codec": cache.codec.spec,
        "dtype": str(cache.dtype).removeprefix("torch."),
        **state.fields,
        "sha256": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    _write(path, tensors, json.dumps(header))


def load_cache(
    path: Path | str,
    config: MLAConfig | Sequence[MLAConfig],
    *,
    codec: Codec | None = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    num_pages: int | None = None,
    device: torch.device | str | None = None,
) -> DenseLatentCache | PagedLatentCache:
    """A new cache with what `save_cache` wrote, checked whole before it is handed over.

    Every byte that carries meaning is under a checksum: a file that was cut or altered is refused.

    Args:
        path: a file of `save_cache`.
        config: of all layers, or a sequence with one for each layer. Compared with the file in all
            that a cached row depends on: C, R, rope and what is done to the latent.
        codec, dtype: what the rows are expected to be; None: what the file says.
        max_length: capacity of a dense cache; None: as it was saved, fixed or growing.
        num_pages: of a pool; None: as many as the saved one had.
        device: of the new cache.

    Returns:
        A cache of the saved layout with the same contents. Positions that no query can see are not
        restored. A pool has new ids for its sequences, in the same order; they share the same
        pages and are found by the same tokens.

    Raises:
        ValueError: not such a file, of another version, altered, or of another config, codec or
            dtype; the message names the fact.
        CacheFull: there is more in the file than ``max_length`` or ``num_pages`` admits.
        ShapeError: ``max_length`` for a paged file, or ``num_pages`` for a dense one.
    """
    path = Path(path)
    with _opened(path) as stored:
        header = _read_header(path, stored.metadata())
        options = {
            "config": _check_config(path, header, config),
            "codec": _check_codec(path, header, codec),
            "dtype": _check_dtype(path, header, dtype),
            "device": device,
        }
        layout = header["layout"]
        foreign, value = ("max_length", max_length)
        if layout == "dense":
            foreign, value = ("num_pages", num_pages)
        if value is not None:
            raise ShapeError(
                f"load_cache: {foreign} has value {value}, expected None: {path} holds a {layout} "
                "cache"
            )
        tables = {
            name: _read_tensor(path, stored, _table_name(name), header, (-1,), kind)
            for name, kind in TABLES[layout].items()
        }
        cache: DenseLatentCache | PagedLatentCache
        if layout == "dense":
            cache, runs = restored_dense(header, options, max_length)
        else:
            cache, runs = restored_paged(header, tables, options, num_pages)
        page, slot = (x.to(cache.device) for x in places(runs))
        for layer, rows in enumerate(cache._rows):
            shape = (len(page), rows.shape[2])
            used = _read_tensor(path, stored, _rows_name(layer), header, shape, rows.dtype)
            rows[page, slot] = used.to(cache.device)
    return cache


def _problem(path: Path, fact: str, expected: str) -> ValueError:
    return ValueError(f"load_cache: {path} has {fact}, expected {expected}")


def _rows_name(layer: int) -> str:
    return f"layers.{layer}.rows"


def _table_name(name: str) -> str:
    return f"tables.{name}"


def _row_values(config: MLAConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {name: values[name] for name in ROW_FIELDS}


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
    if header.get("layout") not in FIELDS:
        raise _problem(path, f"layout {header.get('layout')!r}", f"one of {list(FIELDS)}")
    for name, kind in (HEADER | FIELDS[header["layout"]]).items():
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


def _read_tensor(
    path: Path,
    stored: Any,
    name: str,
    header: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """One tensor of this form; -1 in ``shape`` stands for any size.

    Copied out of the file before the checksum is compared, so that what was checked is used.
    """
    if name not in stored.keys():  # noqa: SIM118 - a file, not a dict
        raise _problem(path, f"no tensor {name}", "all that the header names")
    tensor: Tensor = stored.get_tensor(name).clone()
    fits = len(shape) == tensor.ndim and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        raise _problem(path, f"{tuple(tensor.shape)} {tensor.dtype} at {name}", f"{shape} {dtype}")
    if _digest(tensor) != header["sha256"].get(name):
        raise _problem(path, f"altered bytes in {name}", "those that fit its checksum")
    return tensor
