"""Predict what decoding takes: cache, time of a step, tokens a second, on one device or many.

Bytes are exact. Times are bounds of the attention layers alone, from the data sheet of a device or
from the limits that you give (--gpu custom, or cpu with what you measured); a measured share of
the bound scales attention where the benchmarks have a row like it, and the output says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla.cli import options as values
from mla.cli.console import DTYPES, CommandError
from mla.cli.models import read_config
from mla.cli.plan_text import as_text
from mla.codec import Codec, PlainCodec
from mla.config import MLAConfig
from mla.plan import context_parallel_prefill_bytes, cost_per_million_tokens, sequences_that_fit
from mla.plan.devices import DEVICES, GIVEN, LINKS, Device, device_of, given_device, link_of
from mla.plan.measured import Measured, default_folder, nearest, read_rows, shares
from mla.plan.models import config_layers, preset_layers
from mla.plan.roofline import ALONE, Group, Load, Step, cache_bytes_per_token, decode_step
from mla.plan.splits import best_split
from mla.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        help=f"a folder with a config.json, or one of {', '.join(sorted(PRESETS))}",
    )
    parser.add_argument(
        "--context", type=values.context, required=True, help="cached tokens: 32768, 128k or 1M"
    )
    parser.add_argument("--codec", type=values.codec, default=PlainCodec(), help="of the rows")
    parser.add_argument("--batch", type=values.positive, default=1, help="sequences (default: 1)")
    parser.add_argument("--new-tokens", type=values.positive, default=1, help="of a step and row")
    parser.add_argument("--dtype", choices=[*DTYPES][1:], default="bfloat16", help="of activations")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16, 32), default=16)
    _add_machine(parser.add_argument_group("the machine"))
    _add_groups(parser.add_argument_group("several devices"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_machine(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--gpu", choices=[*DEVICES, *GIVEN], default="h100")
    for name, what in (
        ("bandwidth", "of the memory, bytes a second: 3.35T"),
        ("flops", "a second, with the dtype: 989T"),
        ("memory", "bytes: 80G"),
        ("memory-for-cache", "what weights and activations leave of it (default: all)"),
    ):
        parser.add_argument(f"--{name}", type=values.quantity, metavar="NUMBER", help=what)
    parser.add_argument("--price-per-hour", type=values.temperature, help="of one device")
    parser.add_argument(
        "--rows", type=Path, help="folder with CSV of the benchmarks (default: the checkout's)"
    )


def _add_groups(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--tensor-parallel", type=values.positive, default=1, metavar="N")
    parser.add_argument("--context-parallel", type=values.positive, default=1, metavar="N")
    parser.add_argument(
        "--devices", type=values.positives, default=[], help="find the best split: 8,64,512"
    )
    parser.add_argument("--devices-per-node", type=values.positive, metavar="N")
    parser.add_argument("--link", choices=[*LINKS], help="inside a node")
    parser.add_argument("--network", choices=[*LINKS], default="ib-400", help="between nodes")
    parser.add_argument(
        "--latency", type=values.temperature, default=0.0, help="us for each message (default: 0)"
    )


def run(options: argparse.Namespace) -> int:
    facts = collect(options)
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain data: bytes, seconds, tokens and money."""
    layers, device = layers_of(options.model), machine_of(options)
    codec: Codec = options.codec
    load = Load(
        options.context,
        options.batch,
        options.new_tokens,
        codec,
        DTYPES[options.dtype],
        options.weight_bits,
    )
    memory = device.memory if options.memory_for_cache is None else options.memory_for_cache
    token = cache_bytes_per_token(layers, load)
    planner = _Planner(layers, load, device, options)
    return {
        "model": options.model,
        "layers": len(layers),
        "context": load.context_length,
        "batch": load.batch,
        "new_tokens": load.new_tokens,
        "codec": codec.kind,
        "dtype": options.dtype,
        "weight_bits": load.weight_bits,
        "device": {**device._asdict(), "link": link_of(device.link)._asdict()},
        "network": link_of(options.network)._asdict(),
        "latency": 1e-6 * options.latency,
        "price_per_hour": options.price_per_hour,
        "cache": {
            "bytes_per_token": token,
            "bytes_per_sequence": token * load.context_length,
            "bytes": token * load.context_length * load.batch,
            "memory": memory,
            "is_all_memory": options.memory_for_cache is None,
        },
        "groups": [planner.group(group) for group in groups_of(options)],
        "splits": [planner.split(number, memory) for number in options.devices],
    }


class _Planner:
    """Turns predictions into plain data; remembers what was asked."""

    def __init__(
        self,
        layers: Sequence[MLAConfig],
        load: Load,
        device: Device,
        options: argparse.Namespace,
    ) -> None:
        self.layers, self.load, self.device = layers, load, device
        self.price: float | None = options.price_per_hour
        self.memory_for_cache: float | None = options.memory_for_cache
        if options.rows is not None and not options.rows.is_dir():
            raise CommandError(f"--rows has value {str(options.rows)!r}, expected a folder")
        folder = options.rows or default_folder()
        self.measured = shares(read_rows(folder), device) if folder else []
        self.options: dict[str, Any] = {
            "network": options.network,
            "latency": 1e-6 * options.latency,
            "share": self.share,
        }

    def row(self, config: MLAConfig, load: Load, group: Group) -> Measured | None:
        return nearest(self.measured, config, load, group, self.device)

    def share(self, config: MLAConfig, load: Load, group: Group, device: Device) -> float:
        """Of the bound of attention, 1 where nothing like it was measured."""
        found = self.row(config, load, group)
        return 1.0 if found is None else found.share

    def group(self, group: Group) -> dict[str, Any]:
        step = decode_step(self.layers, self.load, self.device, group, **self.options)
        memory = self.memory_for_cache or self.device.memory
        prefill = [
            context_parallel_prefill_bytes(
                layer,
                batch=self.load.batch,
                num_tokens=self.load.context_length,
                context=group.context,
                dtype=self.load.dtype,
            ).sent
            for layer in self.layers
        ]
        tokens = -(-self.load.context_length // group.context)
        token = cache_bytes_per_token(self.layers, self.load)
        return {
            **group._asdict(),
            "devices": group.size,
            "sequences_that_fit": sequences_that_fit(memory, tokens, token),
            **self.figures(step, group, self.load),
            **self.speed(step.tokens_per_second, group.size),
            "prefill_bytes_sent": sum(prefill),
        }

    def split(self, num_devices: int, memory: float) -> dict[str, Any]:
        """The best split of that many devices; without one only their number."""
        options = {"memory_for_cache": memory, **self.options}
        split = best_split(self.layers, self.load, self.device, num_devices, **options)
        if split is None:
            return {"devices": num_devices, "fits": False}
        load = self.load._replace(batch=self.load.batch // split.data)
        return {
            "devices": num_devices,
            "fits": True,
            "data": split.data,
            **split.group._asdict(),
            **self.figures(split.step, split.group, load),
            **self.speed(split.tokens_per_second, num_devices),
        }

    def figures(self, step: Step, group: Group, load: Load) -> dict[str, Any]:
        rows = {str(found) for c in self.layers if (found := self.row(c, load, group))}
        return {
            "cache_bytes": step.cache_bytes,
            "projections": _part(step.projections),
            "attention": _part(step.attention),
            "measured_rows": sorted(rows),
            "all_reduce": step.all_reduce._asdict(),
            "all_gather": step.all_gather._asdict(),
            "bytes_sent": step.bytes_sent,
            "exchange_seconds": step.exchange_seconds,
            "seconds": step.seconds,
            "seconds_per_layer": step.seconds / step.num_layers,
            "seconds_per_token_and_layer": step.seconds / step.num_layers / step.new_tokens,
        }

    def speed(self, tokens_per_second: float, num_devices: int) -> dict[str, Any]:
        price = None
        if self.price is not None:
            price = cost_per_million_tokens(tokens_per_second, num_devices * self.price)
        return {"tokens_per_second": tokens_per_second, "cost_per_million_tokens": price}


def _part(part: Any) -> dict[str, Any]:
    return {**part.work._asdict(), "seconds": part.seconds, "limit": part.limit}


def layers_of(source: str) -> tuple[MLAConfig, ...]:
    """Of a preset, or of a folder with a ``config.json``."""
    if source in PRESETS:
        return preset_layers(source)
    if not Path(source).exists():
        raise CommandError(
            f"--model has value {source!r}, expected a folder or one of {sorted(PRESETS)}"
        )
    return config_layers(read_config(Path(source)))


def machine_of(options: argparse.Namespace) -> Device:
    """The data sheet, with the limits that were given in place of its own."""
    limits: dict[str, Any] = {
        "bytes_per_second": options.bandwidth,
        "flops_per_second": options.flops,
        "memory": options.memory,
        "link": options.link,
        "node": options.devices_per_node,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if options.gpu not in GIVEN:
        if options.dtype == "float32" and options.flops is None:
            raise CommandError("--dtype float32 needs --flops: data sheets here are of 16 bits")
        device = device_of(options.gpu)
        return device._replace(**given, source=device.source + "; changed as given" * bool(given))
    needed = ("bandwidth", "flops", "memory")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing:
        raise CommandError(f"--gpu {options.gpu} needs {', '.join(missing)}")
    return given_device(options.gpu, **given)


def groups_of(options: argparse.Namespace) -> list[Group]:
    """One device, each kind of group alone, and both together."""
    tensor, context = options.tensor_parallel, options.context_parallel
    asked = [ALONE, Group(tensor), Group(context=context), Group(tensor, context)]
    return list(dict.fromkeys(asked))
