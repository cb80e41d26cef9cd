"""The comparisons of `check` for the ops: append with every codec, decode, prefill, merge.

Dims: B batch, L queries, S keys, C latent width, R rotated width, Z positions in one page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mla import ops, reference
from mla.cli.check_compare import Question
from mla.cli.check_conventions import Conventions
from mla.cli.check_oracle import Oracle
from mla.cli.check_setup import Setup, make_view, read_bytes
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.ops import AttentionOutput
from mla.ops.select import Impl
from mla.reference import Attention
from mla.view import CacheView

CODECS: tuple[Codec, ...] = (
    Fp8Codec(),
    Int8Codec(),
    Int8Codec(rope_bits=8),
    Int4Codec(),
    Int4Codec(group=32, rotation=False),
)
# Largest error of a coded value over the largest value: half a step and a little.
STEP = {"fp8": 1 / 15, "int8": 1 / 200, "int4": 1 / 13}
ROTATED_STEP = 1 / 4  # errors of a block add up at random when it is rotated back
LENGTHS, STARTS, COUNTS = (13, 0, 20), (2, 0, 5), (3, 0, 1)  # ragged, one row empty
B, S, L = len(LENGTHS), 20, 3


def append_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Where rows go, and what the bytes of coded rows mean."""
    rows, plain = setup.rows(B, L), PlainCodec()
    C, R = setup.config.kv_lora_rank, setup.config.qk_rope_head_dim
    counts = setup.integers(COUNTS)

    def written() -> list[Tensor]:
        stored = torch.zeros(B, S, C + R, dtype=setup.dtype, device=setup.device)
        view = CacheView.dense(stored, setup.integers(LENGTHS), C=C, R=R, codec=plain)
        ops.mla_append(view, *rows, new_lengths=counts, impl=impl)
        return [stored]

    def expected(oracle: Oracle) -> list[Tensor]:
        rules = oracle.conventions
        latent, k_rope = (oracle.take(x) for x in rows)
        parts = [latent, k_rope] if rules.row == "latent rope" else [k_rope, latent]
        coded = torch.cat(parts, dim=-1)
        stored = coded.new_zeros(B, S, C + R)
        for b, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
            first = max(length - (count if rules.ragged_at == "own" else L), 0)
            stored[b, first : first + count] = coded[b, :count]
        return [stored]

    yield Question("append", "plain, ragged rows", written, expected)
    for codec in CODECS:
        yield _coded_append_question(setup, impl, codec)


def _name(codec: Codec) -> str:
    kind, *options = codec.spec.split("/")
    return (
        f"{kind}, groups of {options[0]}" + ", 8-bit key" * (options[1] == "8") if options else kind
    )


def _read(setup: Setup, oracle: Oracle, stored: Tensor, codec: Codec) -> Tensor:
    """Coded rows as this oracle reads them, ``[.., C+R]`` float64."""
    rules = oracle.conventions
    low_first, rotation = rules.low_nibble_first, rules.rotation
    found = read_bytes(setup, stored, codec, low_first=low_first, rotation=rotation)
    return torch.cat(found, dim=-1)


def _coded_append_question(setup: Setup, impl: Impl, codec: Codec) -> Question:
    """What the oracle reads from the bytes that append wrote."""
    C, R = setup.config.kv_lora_rank, setup.config.qk_rope_head_dim
    rows = setup.rows(2, 5)

    def written() -> list[Tensor]:
        shape = (2, 5, codec.row_width(C, R))
        stored = torch.zeros(shape, dtype=torch.uint8, device=setup.device)
        view = CacheView.dense(stored, setup.integers([5, 5]), C=C, R=R, codec=codec)
        ops.mla_append(view, *rows, impl=impl)
        return [torch.cat(read_bytes(setup, stored, codec), dim=-1)]

    def expected(oracle: Oracle) -> list[Tensor]:
        latent, k_rope = (x.double().cpu() for x in rows)
        return [torch.cat([_misread(latent, codec, oracle.conventions), k_rope], dim=-1)]

    step = ROTATED_STEP if codec.rotation else STEP[codec.kind]
    slack = step * float(torch.cat(rows, dim=-1).abs().max())
    return Question("append", _name(codec), written, expected, slack)


def _misread(latent: Tensor, codec: Codec, rules: Conventions) -> Tensor:
    """What a right reader finds where the writer followed these conventions."""

    def rotate(x: Tensor) -> Tensor:
        matrix = reference.hadamard(math.gcd(x.shape[-1], 128))
        return (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix).flatten(-2)

    if codec.kind == "int4" and not rules.low_nibble_first:
        latent = rotate(latent) if codec.rotation else latent
        latent = latent.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        latent = rotate(latent) if codec.rotation else latent
    return latent if rules.rotation else rotate(latent)


def gather_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Rows read back, of every codec."""
    rows, C, R = setup.rows(2, 7), setup.config.kv_lora_rank, setup.config.qk_rope_head_dim
    for codec in (PlainCodec(), *CODECS):
        view = make_view(setup, rows, (7, 5), codec=codec, page_size=3)

        def gathered(view: CacheView = view) -> list[Tensor]:
            found = ops.mla_gather(view, 1, 7, dtype=setup.dtype, impl=impl)
            return [torch.cat(found, dim=-1)]

        def expected(oracle: Oracle, codec: Codec = codec) -> list[Tensor]:
            if isinstance(codec, PlainCodec):
                read = torch.cat([oracle.take(x) for x in rows], dim=-1)
                if oracle.conventions.row == "rope latent":
                    read = torch.cat([read[..., R:], read[..., :R]], dim=-1)
            else:
                read = _read(setup, oracle, codec.encode(*rows), codec)
            read = read[:, 1:7].clone()
            read[1, 4:] = 0.0  # beyond the row's length
            return [read]

        assert view.C == C
        rounding = 8 * torch.finfo(setup.dtype).eps * float(torch.cat(rows, -1).abs().max())
        yield Question("gather", _name(codec), gathered, expected, rounding)


def decode_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Ragged rows with padding, several queries, pages, every codec."""
    scale = setup.config.qk_head_dim**-0.5
    rows = setup.rows(B, S)
    plain = PlainCodec()
    cases: list[tuple[str, CacheView, Sequence[int] | None]] = [
        ("one query a row", make_view(setup, rows, LENGTHS, codec=plain), None),
        ("rows that start late", make_view(setup, rows, LENGTHS, codec=plain, starts=STARTS), None),
        ("three queries, ragged", make_view(setup, rows, LENGTHS, codec=plain), COUNTS),
        ("pages of 7", make_view(setup, rows, LENGTHS, codec=plain, page_size=7), COUNTS),
    ]
    for case, view, counts in cases:
        starts = STARTS if view.starts is not None else None
        yield _decode_question(setup, impl, case, view, rows, scale, starts, counts)
    for codec in CODECS:
        view = make_view(setup, rows, LENGTHS, codec=codec)
        readable = codec.encode(*rows)
        read = read_bytes(setup, readable, codec)
        yield _decode_question(setup, impl, _name(codec), view, read, scale, None, None)


def _decode_question(
    setup: Setup,
    impl: Impl,
    case: str,
    view: CacheView,
    rows: tuple[Tensor, Tensor],
    scale: float,
    starts: Sequence[int] | None,
    counts: Sequence[int] | None,
) -> Question:
    num_queries = 1 if counts is None else L
    query = setup.absorbed_queries(B, num_queries)
    starts_B = None if starts is None else setup.integers(starts)
    counts_B = None if counts is None else setup.integers(counts)

    def actual() -> AttentionOutput:
        return ops.mla_decode(*query, view, scale=scale, query_lengths=counts_B, impl=impl)

    def expected(oracle: Oracle) -> Attention:
        lengths = setup.integers(LENGTHS)
        return oracle.absorbed(
            query, rows, lengths, scale=scale, starts=starts_B, query_lengths=counts_B
        )

    return Question("decode", case, actual, expected)


def prefill_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Causal alignment, ragged keys, packed sequences, gradients."""
    for case, num_queries, ragged in (("cold", S, False), ("chunk", 5, False), ("ragged", 5, True)):
        yield _prefill_question(setup, impl, case, num_queries, ragged)
    yield _packed_question(setup, impl)
    yield from _gradient_questions(setup, impl)


def _prefill_question(
    setup: Setup, impl: Impl, case: str, num_queries: int, ragged: bool
) -> Question:
    query, rows, weight = (
        setup.queries(B, num_queries),
        setup.rows(B, S),
        setup.weights["kv_b_proj.weight"],
    )
    scale = setup.config.qk_head_dim**-0.5
    starts = setup.integers(STARTS) if ragged else None
    lengths = setup.integers(LENGTHS) if ragged else setup.integers([S] * B)

    def actual() -> AttentionOutput:
        return ops.mla_prefill(
            *(query, *rows, weight),
            scale=scale,
            key_starts=starts,
            key_lengths=lengths if ragged else None,
            impl=impl,
        )

    def expected(oracle: Oracle) -> Attention:
        return oracle.expanded(query, rows, lengths, scale=scale, starts=starts)

    words = {"cold": f"{S} queries on {S} keys", "chunk": f"{num_queries} queries on {S} keys"}
    return Question("prefill", words.get(case, "ragged keys that start late"), actual, expected)


def _packed_question(setup: Setup, impl: Impl) -> Question:
    ends = (0, 7, 7, S)
    query, rows, weight = setup.queries(1, S), setup.rows(1, S), setup.weights["kv_b_proj.weight"]
    scale = setup.config.qk_head_dim**-0.5

    def actual() -> AttentionOutput:
        return ops.mla_prefill(
            *(query[0], rows[0][0], rows[1][0], weight),
            scale=scale,
            cu_seqlens_q=setup.integers(ends),
            impl=impl,
        )

    def expected(oracle: Oracle) -> list[Tensor]:
        parts = []
        for first, last in itertools.pairwise(ends):
            cut = [x[:, first:last] for x in (query, *rows)]
            length = setup.integers([last - first])
            if last > first:
                parts.append(oracle.expanded(cut[0], (cut[1], cut[2]), length, scale=scale))
        return [torch.cat([part[i][0] for part in parts]) for i in range(2)]

    return Question("prefill", "packed sequences", actual, expected)


def _gradient_questions(setup: Setup, impl: Impl) -> Iterator[Question]:
    names = ("query", "latent", "k_rope", "kv_b_proj")
    inputs = (setup.queries(2, 5), *setup.rows(2, 9), setup.weights["kv_b_proj.weight"])
    scale = setup.config.qk_head_dim**-0.5
    weights = setup.draw(2, 5, setup.config.num_attention_heads, setup.config.v_head_dim, salt=6)

    def of_ours(index: int) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        found = ops.mla_prefill(*leaves, scale=scale, impl=impl)
        return list(
            torch.autograd.grad((found.out * weights).sum() + found.lse.sum(), leaves[index])
        )

    def of_oracle(oracle: Oracle, index: int) -> list[Tensor]:
        leaves = [oracle.take(tensor).detach().clone().requires_grad_() for tensor in inputs]
        copy = Oracle(
            *(oracle.config, oracle.conventions, {"kv_b_proj.weight": leaves[3]}),
            device=oracle.device,
            dtype=oracle.dtype,
        )
        rows = leaves[1], leaves[2]
        found = copy.expanded(leaves[0], rows, setup.integers([9, 9]), scale=scale)
        total = (found.out * oracle.take(weights)).sum() + found.lse.sum()
        return list(torch.autograd.grad(total, leaves[index]))

    for index, name in enumerate(names):
        if inputs[index].numel():
            yield Question(
                "prefill",
                f"gradient of {name}",
                lambda index=index: of_ours(index),  # type: ignore[misc]
                lambda oracle, index=index: of_oracle(oracle, index),  # type: ignore[misc]
            )


def merge_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Parts into one, parts that saw nothing, and keys split in two."""
    H, C = setup.config.num_attention_heads, setup.config.kv_lora_rank
    out = setup.draw(3, 2, 1, H, C, salt=7).to(setup.wide)
    lse = setup.draw(3, 2, 1, H, salt=8, size=3.0).to(setup.wide)
    holed = out.clone(), lse.clone()
    holed[0][1, 0], holed[1][1, 0] = float("nan"), float("-inf")
    for case, parts in (("three parts", (out, lse)), ("a part that saw no key", holed)):

        def actual(parts: tuple[Tensor, Tensor] = parts) -> AttentionOutput:
            return ops.merge_partials(*parts, impl=impl)

        def expected(oracle: Oracle, parts: tuple[Tensor, Tensor] = parts) -> Attention:
            wide = [
                part.to(oracle.device, torch.promote_types(oracle.dtype, torch.float32))
                for part in parts
            ]
            return oracle.merge([Attention(*pair) for pair in zip(*wide, strict=True)])

        yield Question("merge", case, actual, expected)
    yield _split_question(setup, impl)


def _split_question(setup: Setup, impl: Impl) -> Question:
    """Decode over keys 0-8 and 9-19 as "auto" does, merged."""
    query, rows = setup.absorbed_queries(2, 1), setup.rows(2, S)
    scale = setup.config.qk_head_dim**-0.5
    spans = ((0, 9), (9, S))

    def actual() -> AttentionOutput:
        parts = []
        for first, last in spans:
            view = make_view(setup, rows, [last] * 2, codec=PlainCodec(), starts=[first] * 2)
            parts.append(ops.mla_decode(*query, view, scale=scale, out_dtype=setup.wide))
        out, lse = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return ops.merge_partials(out, lse, impl=impl)

    def expected(oracle: Oracle) -> Attention:
        return oracle.merge(
            [
                oracle.absorbed(
                    query,
                    rows,
                    setup.integers([last] * 2),
                    scale=scale,
                    starts=setup.integers([first] * 2),
                )
                for first, last in spans
            ]
        )

    return Question("merge", "keys decoded in two parts", actual, expected)
