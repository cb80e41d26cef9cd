"""What `mla.cli.plan` found, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mla.cli.console import table

SCOPE = (
    "Attention layers alone, without embeddings, MLPs and experts: a model is slower than this, "
    "and costs more."
)


def as_text(facts: Mapping[str, Any]) -> str:
    """The whole plan."""
    price = facts["price_per_hour"] is not None
    lines = [*_head(facts), "", *_cache(facts), "", "one step of decoding"]
    lines.append(table(_columns(price), [_row(group, price) for group in facts["groups"]]))
    lines += _notes(facts, facts["groups"])
    if facts["splits"]:
        lines += ["", "best split of more devices: data x tensor x context parallel"]
        lines.append(table(_columns(price), [_row(split, price) for split in facts["splits"]]))
        lines += _notes(facts, facts["splits"])
    return "\n".join([*lines, "", SCOPE])


def _head(facts: Mapping[str, Any]) -> list[str]:
    device, network = facts["device"], facts["network"]
    link = device["link"]
    sequences = f"{facts['batch']:,} sequence{'s' * (facts['batch'] != 1)}"
    lines = [
        f"{facts['model']}: {facts['layers']} MLA layers, {facts['codec']} rows, "
        f"{facts['dtype']}, {facts['weight_bits']}-bit weights; {sequences} of "
        f"{facts['context']:,} tokens",
        f"{device['name']}: {si(device['bytes_per_second'])}B/s, "
        f"{si(device['flops_per_second'])}FLOP/s, {si(device['memory'])}B ({device['source']})",
    ]
    is_alone = all(group["devices"] == 1 for group in facts["groups"])
    if facts["splits"] or not is_alone:
        inside = f"{link['name']} {si(link['bytes_per_second'])}B/s in a node of {device['node']}, "
        inside = inside if device["node"] > 1 else ""
        lines.append(
            f"links, one direction: {inside}{network['name']} "
            f"{si(network['bytes_per_second'])}B/s between nodes"
        )
    return lines


def _cache(facts: Mapping[str, Any]) -> list[str]:
    cache, groups = facts["cache"], facts["groups"]
    of = f"in {si(cache['memory'])}B of a device"
    if cache["is_all_memory"]:
        of += ", all it has; --memory-for-cache is what weights leave"
    per_layer = cache["bytes_per_token"] / facts["layers"]
    return [
        f"cache of a token     {cache['bytes_per_token']:,} bytes, {per_layer:,.0f} a layer",
        f"cache of a sequence  {si(cache['bytes_per_sequence'])}B",
        f"cache of the batch   {si(cache['bytes'])}B",
        f"sequences that fit   {of}",
        *(f"  {_name(group)}: {group['sequences_that_fit']:,}" for group in groups),
    ]


def _columns(price: bool) -> tuple[str, ...]:
    return (
        *("devices", "cache of each", "projections", "bound by", "attention", "bound by"),
        *("sent by each", "exchange", "step", "layer", "tokens/s"),
        *["cost of 1M tokens"] * price,
    )


def _row(found: Mapping[str, Any], price: bool) -> list[str]:
    if not found.get("fits", True):
        return [f"{found['devices']:,}: does not fit", *["-"] * (10 + price)]
    parts = [found["projections"], found["attention"]]
    cells = [_name(found), f"{si(found['cache_bytes'])}B"]
    for part in parts:
        cells += [f"{si(part['seconds'])}s", part["limit"]]
    cells += [
        f"{si(found['bytes_sent'])}B",
        f"{si(found['exchange_seconds'])}s",
        f"{si(found['seconds'])}s",
        f"{si(found['seconds_per_layer'])}s",
        f"{found['tokens_per_second']:,.0f}",
    ]
    return [*cells, f"{found['cost_per_million_tokens']:.3g}"] if price else cells


def _name(found: Mapping[str, Any]) -> str:
    """``32 = tensor 8 x context 4``."""
    factors = [
        f"{kind} {found[kind]}" for kind in ("data", "tensor", "context") if found.get(kind, 1) > 1
    ]
    total = f"{found['devices']:,}"
    return f"{total} = {' x '.join(factors)}" if factors else f"{total} device"


def _notes(facts: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which share of the bound was used, what messages cost, what a prefill moves."""
    lines = []
    shown = [one for one in found if one.get("fits", True)]
    large = [_name(one) for one in shown if one["cache_bytes"] > facts["cache"]["memory"]]
    if large:
        lines.append(f"  The cache does not fit: {', '.join(large)}.")
    without = [_name(one) for one in shown if not one["measured_rows"]]
    if without:
        which = "Times" if len(without) == len(shown) else f"Times of {', '.join(without)}"
        lines.append(f"  {which} are the bound: nothing like them has been measured.")
    lines += [
        f"  {_name(one)}: attention at the measured share {row}."
        for one in shown
        for row in one["measured_rows"]
    ]
    if any(one["measured_rows"] for one in shown):
        lines.append("  python -m benchmarks.check_plan shows how far such shares are off.")
    messages = [
        f"{_name(one)}: {one['all_reduce']['messages'] + one['all_gather']['messages']:,}"
        for one in shown
        if one["bytes_sent"]
    ]
    if messages and not facts["latency"]:
        lines.append(
            f"  Exchange counts bytes alone; messages one after another in a step: "
            f"{'; '.join(messages)} (--latency US adds what each takes)."
        )
    lines += [
        f"  {_name(one)}: a prefill of the batch makes each device send "
        f"{si(one['prefill_bytes_sent'])}B of latents."
        for one in shown
        if one.get("prefill_bytes_sent")
    ]
    return lines


def si(value: float) -> str:
    """Three digits and a prefix, to be followed by the unit: ``1.25 m``."""
    for prefix, size in {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}.items():
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    for prefix, size in {"m": 1e-3, "u": 1e-6}.items():
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value / 1e-9:.3g} n" if value else "0 "
