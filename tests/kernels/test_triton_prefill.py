"""The prefill kernels against the oracle, forward and backward, and by what they promise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from devices import DEVICE, DTYPES, on_cpu, on_device
from helpers import assert_lse_within_budget, assert_within_budget, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor

pytest.importorskip("triton")

from mla import reference
from mla.kernels import prefill_operands
from mla.ops import AttentionOutput, mla_prefill

NAMES = ("query", "latent", "k_rope", "kv_b_weight")
FEW = settings(max_examples=settings.default.max_examples // 4)  # the interpreter is slow
# The interpreter's products, which are NumPy's, round by the place of a row in its tile.
IS_EXACT = DEVICE.type == "cpu"
# Widths in one tile and in two, with columns that no tile fills; tiles of the interpreter's table
# have 16 queries and 16 keys.
WIDTHS = [(20, 6, 40), (8, 0, 16), (0, 6, 5), (36, 18, 9)]  # N, R, V


@dataclass(frozen=True)
class Case:
    """Sequences of (queries, first visible key, end of the visible keys), padded or packed."""

    spans: tuple[tuple[int, int, int], ...]
    is_packed: bool = False
    causal: bool = True
    H: int = 2
    N: int = 20
    R: int = 6
    V: int = 40
    C: int = 24
    dtype: torch.dtype = torch.float32
    scale: float = 0.3
    is_exact: bool = False  # latents and weights whose products float32 adds without rounding
    seed: int = 0

    @property
    def L(self) -> int:
        return max(queries for queries, _, _ in self.spans)

    @property
    def S(self) -> int:
        return max(end for _, _, end in self.spans) + 2

    def inputs(self) -> tuple[Tensor, ...]:
        """query, latent, k_rope, kv_b_weight; a padded batch has NaN where no key is visible."""
        B, E = len(self.spans), self.N + self.R
        shapes = [(B, self.L, self.H, E), (B, self.S, self.C), (B, self.S, self.R)]
        shapes.append((self.H * (self.N + self.V), self.C))
        tensors = [
            randn(*shape, seed=self.seed + i, dtype=torch.float64) for i, shape in enumerate(shapes)
        ]
        tensors[3] *= self.C**-0.5
        if self.is_exact:
            tensors[1:] = [(8 * x).round() / 8 for x in tensors[1:]]
        query, latent, k_rope, weight = (x.to(self.dtype) for x in tensors)
        if not self.is_packed:
            for x in (latent, k_rope):
                x.masked_fill_(self.unseen()[..., None], float("nan"))
            return query, latent, k_rope, weight
        counts = [(queries, slice(begin, end)) for queries, begin, end in self.spans]
        query = torch.cat([query[b, : counts[b][0]] for b in range(B)])
        latent, k_rope = (
            torch.cat([x[b, counts[b][1]] for b in range(B)]) for x in (latent, k_rope)
        )
        return query, latent, k_rope, weight

    def unseen(self) -> Tensor:
        key = torch.arange(self.S)
        return torch.stack([(key < begin) | (key >= end) for _, begin, end in self.spans])

    def masking(self) -> dict[str, Any]:
        queries, begins, ends = zip(*self.spans, strict=True)
        if self.is_packed:
            keys = [end - begin for begin, end in zip(begins, ends, strict=True)]
            both = {"cu_seqlens_q": queries, "cu_seqlens_k": keys}
            return {
                name: torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
                for name, counts in both.items()
            }
        return {
            "key_starts": torch.tensor(begins, dtype=torch.int32),
            "key_lengths": torch.tensor(ends, dtype=torch.int32),
        }

    def run(self, inputs: tuple[Tensor, ...] | None = None, **options: Any) -> AttentionOutput:
        inputs = self.inputs() if inputs is None else inputs
        options = {**self.masking(), **options}
        result = mla_prefill(
            *on_device(inputs),
            scale=self.scale,
            causal=self.causal,
            impl="triton",
            **on_device(options),
        )
        return AttentionOutput(*on_cpu(tuple(result)))

    def oracle(self, inputs: tuple[Tensor, ...]) -> AttentionOutput:
        """Sequence by sequence, as padded or packed as the case is."""
        query, latent, k_rope, weight = inputs
        outs, lses = [], []
        first_q = first_k = 0
        for b, (queries, begin, end) in enumerate(self.spans):
            if self.is_packed:
                q = query[first_q : first_q + queries][None]
                c, r = (x[first_k : first_k + end - begin][None] for x in (latent, k_rope))
                first_q, first_k = first_q + queries, first_k + end - begin
            else:
                q, c, r = (
                    query[b : b + 1],
                    latent[b : b + 1, begin:end],
                    k_rope[b : b + 1, begin:end],
                )
            out, lse = reference.expanded_attention(
                q, c, r, weight,
                num_heads=self.H, value_dim=self.V, scale=self.scale, causal=self.causal,
            )  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        join = torch.cat if self.is_packed else torch.stack
        return AttentionOutput(join(outs), join(lses))


# Several tiles of queries and keys, queries without keys and keys without queries.
PADDED = Case(spans=((35, 3, 40), (35, 0, 20)))
PACKED = Case(spans=((17, 0, 37), (0, 0, 3), (5, 0, 2)), is_packed=True, N=36, R=18, V=9, C=40)


@st.composite
def cases(draw: Any, **fixed: Any) -> Case:
    """One or two sequences; queries without keys and keys without queries among them."""
    is_packed = draw(st.booleans())
    queries = st.sampled_from([0, 1, 5, 17, 35])
    L = draw(queries)
    spans = []
    for _ in range(draw(st.integers(1, 2))):
        begin = draw(st.sampled_from([0, 3]))
        keys = draw(st.sampled_from([0, 1, L, 16, 37]))
        spans.append((draw(queries) if is_packed else L, begin, begin + keys))
    N, R, V = draw(st.sampled_from(WIDTHS))
    fields = {
        "spans": tuple(spans),
        "is_packed": is_packed,
        "causal": draw(st.booleans()),
        "H": draw(st.sampled_from([1, 2])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(SEEDS),
    }
    return Case(**{**fields, "N": N, "R": R, "V": V, "C": draw(st.sampled_from([5, 40])), **fixed})


def outputs(
    case: Case, inputs: tuple[Tensor, ...], *, by_oracle: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """Out, lse and, for random gradients of both, the gradients of the inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    result = case.oracle(leaves) if by_oracle else case.run(leaves, **options)
    towards = [randn(*x.shape, seed=case.seed + 9 + x.ndim, dtype=torch.float64) for x in result]
    towards = [
        g.masked_fill(x.isinf(), 0).to(x.dtype) for g, x in zip(towards, result, strict=True)
    ]
    grads = torch.autograd.grad(tuple(result), leaves, towards, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return (*(x.detach() for x in result), *grads)


def double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in inputs)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def assert_gradients(case: Case, inputs: tuple[Tensor, ...]) -> None:
    actual = outputs(case, inputs)
    oracle = outputs(case, double(inputs), by_oracle=True)
    eager = outputs(case, inputs, by_oracle=True)
    # Weights are computed again as exp(scores - lse), so each inherits the rounding of lse; sums of
    # about sqrt(H * V) cancel, with a single key exactly so in the eager run.
    size = max([1.0, *oracle[1][oracle[1].isfinite()].abs().tolist()])
    least = size * 4 * (case.H * case.V) ** 0.5 if case.dtype == torch.float32 else 0.0
    for name, *three in zip(NAMES, actual[2:], oracle[2:], eager[2:], strict=True):
        assert_within_budget(*three, name, least=least)


@FEW
@given(case=cases())
@example(case=PADDED)
@example(case=PACKED)
def test_matches_the_oracle(case) -> None:
    inputs = case.inputs()
    actual = case.run(inputs)
    oracle, eager = case.oracle(double(inputs)), case.oracle(inputs)
    assert_within_budget(actual.out, oracle.out, eager.out, "out")
    assert_lse_within_budget(actual.lse, oracle.lse, eager.lse)
    assert actual.out.dtype == case.dtype and actual.lse.dtype == torch.float32


@FEW
@given(case=cases(dtype=torch.float32))
@example(case=PADDED)
@example(case=PACKED)
def test_gradients_match_the_oracle(case) -> None:
    assert_gradients(case, case.inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_match_the_oracle(dtype) -> None:
    case = replace(PADDED, dtype=dtype)
    assert_gradients(case, case.inputs())


@FEW
@given(case=cases(is_exact=IS_EXACT))
@example(case=replace(PACKED, is_exact=IS_EXACT))
def test_a_sequence_has_the_same_bits_in_any_batch(case) -> None:
    """Padded or packed with others, and packed alone: out, lse and the gradient of the query."""
    inputs = case.inputs()
    together = outputs(case, inputs)
    query, latent, k_rope, weight = inputs
    first_q = first_k = 0
    for b, (queries, begin, end) in enumerate(case.spans):
        if case.is_packed:
            q = query[first_q : first_q + queries]
            c, r = (x[first_k : first_k + end - begin] for x in (latent, k_rope))
            expected = [x[first_q : first_q + queries] for x in together[:3]]
            first_q, first_k = first_q + queries, first_k + end - begin
        else:
            q, c, r = query[b], latent[b, begin:end], k_rope[b, begin:end]
            expected = [x[b] for x in together[:3]]
        alone = replace(case, spans=((queries, 0, end - begin),), is_packed=True)
        assert_same_bits(alone.run((q, c, r, weight)), expected[:2])


@FEW
@given(t=st.integers(0, 36), seed=SEEDS)
@example(t=20, seed=0)
def test_a_key_changes_nothing_before_it(t, seed) -> None:
    case = Case(spans=((37, 0, 37),), seed=seed, H=1)
    query, latent, k_rope, weight = case.inputs()
    before = case.run((query, latent, k_rope, weight))
    latent[:, t], k_rope[:, t] = 5.0, -5.0
    after = case.run((query, latent, k_rope, weight))
    assert_same_bits([x[:, :t] for x in after], [x[:, :t] for x in before])
    assert not torch.equal(after.lse[:, t:], before.lse[:, t:])


@pytest.mark.parametrize("given", [(), ("key_starts",), ("key_lengths",)])
@pytest.mark.parametrize("causal", [True, False])
def test_bounds_that_are_not_given(given, causal) -> None:
    """Without key_starts rows begin at 0, without key_lengths they end with the tensor."""
    case = Case(spans=((18, 3, 35), (18, 0, 19)), causal=causal)
    inputs = tuple(x.nan_to_num(0.5) for x in case.inputs())
    masking = {name: x if name in given else None for name, x in case.masking().items()}
    starts = [begin if "key_starts" in given else 0 for _, begin, _ in case.spans]
    ends = [end if "key_lengths" in given else case.S for _, _, end in case.spans]
    bounds = [(18, begin, end) for begin, end in zip(starts, ends, strict=True)]
    oracle = replace(case, spans=tuple(bounds))
    found = outputs(case, inputs, **masking)
    expected = outputs(oracle, double(inputs), by_oracle=True)
    plain = outputs(oracle, inputs, by_oracle=True)
    for name, *three in zip(("out", "lse", *NAMES), found, expected, plain, strict=True):
        assert_within_budget(*three, name, least=16.0)


def test_a_query_that_sees_no_key_may_hold_anything() -> None:
    case = Case(spans=((20, 0, 3),))
    query, *others = case.inputs()
    expected = outputs(case, (query, *others))
    query = query.clone()
    query[:, :17] = float("nan")
    for actual, wanted in zip(outputs(case, (query, *others)), expected, strict=True):
        assert torch.equal(actual, wanted)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between all elements."""
    shape = [2 * size for size in x.shape]
    room = torch.full(shape, float("nan"), dtype=x.dtype)[tuple([slice(None, None, 2)] * x.ndim)]
    return room.copy_(x)


def test_strides_change_no_bit() -> None:
    case = Case(spans=((17, 3, 20), (17, 0, 18)))
    inputs = case.inputs()
    apart = tuple(strided(x) for x in inputs)
    assert not any(x.is_contiguous() for x in apart)
    assert_same_bits(outputs(case, apart), outputs(case, inputs))


def test_groups_of_heads_change_no_bit_of_the_forward_pass(monkeypatch) -> None:
    case = Case(spans=((17, 0, 20),), H=3, is_exact=IS_EXACT)
    inputs = case.inputs()
    whole = outputs(case, inputs)
    monkeypatch.setattr(prefill_operands, "MAX_EXPANDED", 2 * case.S * (case.N + case.V))
    parts = outputs(case, inputs)
    assert_same_bits(parts[:3], whole[:3])
    for a, b in zip(parts[3:], whole[3:], strict=True):
        torch.testing.assert_close(a, b)


def test_saved_keys_and_tight_bounds_change_no_bit() -> None:
    case = Case(spans=((17, 0, 20), (3, 0, 3), (0, 0, 5)), is_packed=True)
    inputs = case.inputs()
    expected = outputs(case, inputs)
    assert_same_bits(outputs(case, inputs, save="expanded"), expected)
    assert_same_bits(outputs(case, inputs, max_q=17, max_k=20), expected)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale) -> None:
    case = Case(spans=((5, 0, 20),), H=1, scale=scale)
    inputs = tuple(x.masked_fill(x.isnan(), 0) for x in case.inputs())
    oracle, eager = case.oracle(double(inputs)), case.oracle(inputs)
    assert_within_budget(case.run(inputs).out, oracle.out, eager.out, "out")
    assert_gradients(case, inputs)


def test_gradients_are_the_same_bits_each_time() -> None:
    case = PADDED
    assert_same_bits(outputs(case, case.inputs()), outputs(case, case.inputs()))


def test_nothing_to_attend_to() -> None:
    for spans in (((3, 0, 0),), ((0, 0, 3),)):
        out, lse, *grads = outputs(Case(spans=spans), Case(spans=spans).inputs())
        assert (out == 0).all() and (lse == float("-inf")).all()
        assert all((g == 0).all() for g in grads)


def test_keys_without_queries_may_hold_anything() -> None:
    case = Case(spans=((0, 0, 3), (2, 0, 2)), is_packed=True)
    query, latent, k_rope, weight = case.inputs()
    expected = outputs(case, (query, latent, k_rope, weight))
    latent[:3], k_rope[:3] = float("nan"), float("nan")
    assert_same_bits(outputs(case, (query, latent, k_rope, weight)), expected)


@pytest.mark.cuda
def test_a_captured_graph_follows_the_lengths() -> None:
    case = Case(spans=((35, 0, 40), (35, 0, 37)), dtype=torch.bfloat16)
    inputs = on_device(case.inputs())
    lengths = torch.tensor([40, 37], dtype=torch.int32, device=DEVICE)

    def run() -> AttentionOutput:
        return mla_prefill(*inputs, scale=case.scale, key_lengths=lengths, impl="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    lengths.copy_(torch.tensor([12, 0], dtype=torch.int32))
    graph.replay()
    assert_same_bits(captured, run())
