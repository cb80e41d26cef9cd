"""Versions, devices, which implementation runs where and why not a faster one, and presets."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

import mla
from mla.checks import UnsupportedError
from mla.cli.console import table
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.config import MLAConfig
from mla.kernels import cpu
from mla.ops.select import OPS, TABLE, Case, OpName, reason_not_auto, resolve, supported_impls
from mla.plan import bytes_per_token
from mla.presets import PRESETS

PACKAGES = ("torch", "triton", "transformers", "einops", "safetensors", "rich", "matplotlib")
ABSENT = "not installed"
CODECS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())
SHOWN_DTYPES = (torch.float32, torch.bfloat16)
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "sve", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print(as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain data."""
    return {
        "mla": mla.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": _devices(),
        "cpp": cpu.describe()._asdict(),
        "implementations": [
            {
                "name": row.name,
                "ops": list(row.ops),
                "devices": ", ".join(row.devices) or "any",
                "batch_invariant": row.batch_invariant,
                "note": row.note,
            }
            for row in TABLE
        ],
        "choices": _choices(),
        "presets": {name: _preset(MLAConfig.preset(name)) for name in PRESETS},
    }


def _version(package: str) -> str:
    """Installed version, from the metadata: importing transformers takes seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _devices() -> list[dict[str, Any]]:
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    cpu = {
        "device": "cpu",
        "name": str(features.get("cpu_name") or platform.processor() or platform.machine()),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in CPU_FEATURES if features.get(name)],
    }
    found: list[dict[str, Any]] = [cpu]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "processors": properties.multi_processor_count,
                }
            )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor()})
    return found


def _choices() -> list[dict[str, Any]]:
    """For each op, device and dtype: what ``impl="auto"`` takes, and why nothing before it."""
    kinds = sorted({device["device"].partition(":")[0] for device in _devices()})
    return [_choice(kind, op, dtype) for kind in kinds for op in OPS for dtype in SHOWN_DTYPES]


def _choice(kind: str, op: OpName, dtype: torch.dtype) -> dict[str, Any]:
    case = Case(op, kind, dtype)
    try:
        taken = resolve("auto", case).name
    except UnsupportedError:
        taken = None
    rows = supported_impls(op, device=kind, dtype=dtype)
    names = [name for name, _ in rows]
    faster = rows[: names.index(taken)] if taken in names else rows
    return {
        "device": kind,
        "op": op,
        "dtype": str(dtype).removeprefix("torch."),
        "taken": taken,
        "not_taken": {name: reason or reason_not_auto(name, case) for name, reason in faster},
    }


def _preset(config: MLAConfig) -> dict[str, Any]:
    H, N, R, V = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    return {
        "D": config.hidden_size,
        "H": H,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "N": N,
        "R": R,
        "V": V,
        "rope": config.rope.pairing,
        "bytes": {codec.kind: bytes_per_token(config, codec) for codec in CODECS},
        "bytes_expanded": 2 * H * (N + R + V),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    versions = [f"{name} {version}" for name, version in facts["packages"].items()]
    kinds = [codec.kind for codec in CODECS]
    lines = [
        f"mla {facts['mla']}, python {facts['python']} on {sys.platform}",
        f"  {', '.join(versions)}",
        "",
        "devices",
        *(f"  {_device_line(device)}" for device in facts["devices"]),
        *["  no CUDA device"] * (not torch.cuda.is_available()),
        f"  C++ kernels: {facts['cpp']['reason_absent'] or _cpp_line(facts['cpp'])}",
        "",
        "implementations, fastest first",
        table(
            ("impl", "devices", "batch-invariant", "ops"),
            [_implementation_row(row) for row in facts["implementations"]],
        ),
        *(f"  {row['name']}: {row['note']}" for row in facts["implementations"]),
        "",
        "what impl='auto' takes here",
        table(
            ("device", "op", "dtypes", "impl", "why no faster one"), _choice_rows(facts["choices"])
        ),
        "",
        "presets, and bytes cached for one token in one layer",
        table(
            ("preset", *"DHQCNRV", "rope", "bf16", *kinds[1:], "K and V in bf16"),
            [_preset_row(*item) for item in facts["presets"].items()],
        ),
    ]
    return "\n".join(lines)


def _implementation_row(row: dict[str, Any]) -> tuple[str, ...]:
    ops = "all" if set(row["ops"]) == set(OPS) else ", ".join(row["ops"])
    return row["name"], row["devices"], "yes" if row["batch_invariant"] else "no", ops


def _choice_rows(choices: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each device and op; dtypes share it where the answer is the same."""
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for choice in choices:
        reasons = "; ".join(f"{name} {why}" for name, why in choice["not_taken"].items())
        key = (
            choice["device"],
            choice["op"],
            choice["taken"] or "none",
            reasons or "there is none",
        )
        dtypes.setdefault(key, []).append(choice["dtype"])
    return [
        (device, op, ", ".join(names), taken, why)
        for (device, op, taken, why), names in dtypes.items()
    ]


def _device_line(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        features = f" ({', '.join(device['features'])})" if device["features"] else ""
        threads = f"{device['threads']} thread{'s' * (device['threads'] != 1)}"
        return f"cpu  {device['name']}, {threads}, {device['vectors']}{features}"
    details = [device["name"]]
    if "capability" in device:
        details += [f"sm_{device['capability'].replace('.', '')}", f"{device['memory_gib']} GiB"]
    return f"{device['device']}  {', '.join(details)}"


def _cpp_line(facts: dict[str, Any]) -> str:
    *others, fastest = facts["instruction_sets"]
    return f"{fastest}; can be forced to {', '.join(reversed(others)) or 'no other'}"


def _preset_row(name: str, facts: dict[str, Any]) -> tuple[object, ...]:
    sizes = ("-" if facts[letter] is None else facts[letter] for letter in "DHQCNRV")
    return (name, *sizes, facts["rope"], *facts["bytes"].values(), facts["bytes_expanded"])
