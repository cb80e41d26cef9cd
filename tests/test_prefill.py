"""mla_prefill against the oracle: forward and gradients, padded and packed, all widths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import assert_lse_within_budget, assert_within_budget, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, HEADS, SEEDS
from torch import Tensor

from mla import reference
from mla.checks import UnsupportedError
from mla.kernels.eager import flash, prefill
from mla.ops import AttentionOutput, mla_prefill

F64 = torch.float64
NAMES = ("query", "latent", "k_rope", "kv_b_weight")


@dataclass(frozen=True)
class PrefillCase:
    """Queries at the end of keys; with ``pairs`` packed sequences of (queries, keys)."""

    L: int
    S: int
    H: int
    C: int
    N: int
    R: int
    V: int
    causal: bool
    key_starts: tuple[int, ...] | None
    key_lengths: tuple[int, ...] | None
    B: int
    dtype: torch.dtype
    seed: int

    scale: float = 0.4

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Rounded to the dtype of the case, then in ``dtype``; keys outside their range are 0."""
        shapes = [
            (self.B, self.L, self.H, self.N + self.R),
            (self.B, self.S, self.C),
            (self.B, self.S, self.R),
            (self.H * (self.N + self.V), self.C),
        ]
        tensors = [randn(*s, seed=self.seed + i, dtype=F64) for i, s in enumerate(shapes)]
        tensors[3] *= self.C**-0.5
        tensors = [x.to(self.dtype).to(dtype or self.dtype) for x in tensors]
        for tensor in tensors[1:3]:
            tensor.masked_fill_(self.unseen()[..., None], 0.0)
        return tensors

    def unseen(self) -> Tensor:
        """Keys outside their range, ``[B, S]``."""
        key = torch.arange(self.S)
        starts = torch.tensor(self.key_starts or [0] * self.B)[:, None]
        ends = torch.tensor(self.key_lengths or [self.S] * self.B)[:, None]
        return (key < starts) | (key >= ends)

    def masking(self) -> dict[str, Any]:
        options = {"key_starts": self.key_starts, "key_lengths": self.key_lengths}
        return {
            name: None if value is None else torch.tensor(value, dtype=torch.int32)
            for name, value in options.items()
        }

    def run(self, inputs: list[Tensor], **options: Any) -> AttentionOutput:
        return mla_prefill(
            *inputs, scale=self.scale, causal=self.causal, **self.masking(), **options
        )

    def oracle(self, inputs: list[Tensor]) -> reference.Attention:
        return reference.expanded_attention(
            *inputs,
            num_heads=self.H,
            value_dim=self.V,
            scale=self.scale,
            causal=self.causal,
            **self.masking(),
        )


@st.composite
def prefill_cases(draw: Any, **fixed: Any) -> PrefillCase:
    B = draw(st.integers(1, 3))
    S = draw(st.integers(1, 12))
    N, R = draw(st.sampled_from([(3, 2), (8, 0), (0, 6), (1, 6), (12, 2)]))
    starts = st.none() | st.tuples(*[st.integers(0, S)] * B)
    fields = {
        "B": B,
        "S": S,
        "L": draw(st.one_of(st.just(S), st.integers(1, 14))),
        "H": draw(HEADS),
        "C": draw(st.sampled_from([5, 9, 24])),
        "N": N,
        "R": R,
        "V": draw(st.sampled_from([1, 5, 14, N + R])),  # below, above and at the key width
        "causal": draw(st.booleans()),
        "key_starts": draw(starts),
        "key_lengths": draw(starts),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(SEEDS),
    }
    return PrefillCase(**{**fields, **fixed})


@contextmanager
def implementation(name: str, scores: int = 1 << 26, expanded: int = 1 << 25) -> Any:
    """``fused``: PyTorch's kernel for CPUs; ``blocked``: the code of other devices."""
    with ExitStack() as stack:
        if name == "blocked":
            stack.enter_context(patch.object(prefill, "flash_forward", flash.blocked_forward))
            stack.enter_context(patch.object(prefill, "flash_backward", flash.blocked_backward))
        stack.enter_context(patch.object(flash, "MAX_SCORES", scores))
        stack.enter_context(patch.object(prefill, "MAX_EXPANDED", expanded))
        yield


BOTH = pytest.mark.parametrize("name", ["fused", "blocked"])


@BOTH
@given(case=prefill_cases())
def test_matches_the_oracle(case, name):
    inputs = case.inputs()
    oracle, plain = case.oracle(case.inputs(F64)), case.oracle(inputs)
    for tensor in inputs[1:3]:
        tensor.masked_fill_(case.unseen()[..., None], float("nan"))
    with implementation(name):
        actual = case.run(inputs)
    assert_within_budget(actual.out, oracle.out, plain.out, "out")
    assert_lse_within_budget(actual.lse, oracle.lse, plain.lse)
    assert actual.out.dtype == case.dtype
    assert actual.lse.dtype == torch.promote_types(case.dtype, torch.float32)


def gradients(
    run: Callable[[list[Tensor]], tuple[Tensor, Tensor]], inputs: list[Tensor], seed: int
) -> tuple[Tensor, ...]:
    """Of a random combination of out and the finite lse."""
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = run(inputs)
    d_out = randn(*out.shape, seed=seed, dtype=F64).to(out.dtype)
    d_lse = randn(*lse.shape, seed=seed + 1, dtype=F64).to(lse.dtype)
    seen = lse.detach() != float("-inf")
    loss = (out * d_out).sum() + (lse * d_lse)[seen].sum()
    return torch.autograd.grad(loss, inputs)


@BOTH
@pytest.mark.parametrize("save", ["latent", "expanded"])
@given(case=prefill_cases())
def test_gradients_match_the_oracle_and_ignore_what_is_not_seen(case, save, name):
    inputs = case.inputs()
    for tensor in inputs[1:3]:
        tensor.masked_fill_(case.unseen()[..., None], float("nan"))
    with implementation(name):
        actual = gradients(lambda x: case.run(x, save=save), inputs, case.seed)
    oracle = gradients(case.oracle, case.inputs(F64), case.seed)
    plain = gradients(case.oracle, case.inputs(), case.seed)
    # Sums of about this size cancel: with a single key exactly so in the eager run, where autograd
    # does not subtract sum(grad_out * out). Found over 2000 drawn cases.
    least = 4 * (case.H * case.V) ** 0.5
    for label, *grads in zip(NAMES, actual, oracle, plain, strict=True):
        assert_within_budget(*grads, f"gradient of {label}", least=least)
        assert grads[0].dtype == case.dtype
    for grad in actual[1:3]:
        assert (grad[case.unseen()] == 0).all()


@BOTH
@pytest.mark.parametrize("save", ["latent", "expanded"])
@pytest.mark.parametrize(("N", "R", "V"), [(2, 2, 3), (3, 0, 3), (0, 2, 5), (3, 2, 5)])
@pytest.mark.parametrize("starts", [None, (0, 1)])
def test_gradcheck(N, R, V, starts, save, name):
    case = PrefillCase(
        L=3, S=4, H=2, C=3, N=N, R=R, V=V, causal=True, key_starts=starts, key_lengths=(4, 4),
        B=2, dtype=F64, seed=0,
    )  # fmt: skip
    inputs = [x.requires_grad_() for x in case.inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.run(list(tensors), save=save))

    with implementation(name):
        assert torch.autograd.gradcheck(run, inputs)


@BOTH
@given(
    case=prefill_cases(B=1, key_starts=None, key_lengths=None),
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    has_own_keys=st.booleans(),
)
def test_packed_sequences_are_sequences_alone(case, pairs, has_own_keys, name):
    ends_q, ends_k = [0], [0]
    for num_queries, num_keys in pairs:
        ends_q.append(ends_q[-1] + num_queries)
        ends_k.append(ends_k[-1] + (num_keys if has_own_keys else num_queries))
    case = PrefillCase(**{**case.__dict__, "L": ends_q[-1], "S": ends_k[-1], "dtype": F64})
    query, latent, k_rope, weight = case.inputs()
    inputs = [query[0], latent[0], k_rope[0], weight]
    boundaries = [torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k)]

    def run(tensors: list[Tensor]) -> AttentionOutput:
        options = {"cu_seqlens_k": boundaries[1]} if has_own_keys else {}
        return mla_prefill(
            *tensors, scale=case.scale, causal=case.causal, cu_seqlens_q=boundaries[0], **options
        )

    def alone(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, c, r, w = tensors
        parts = [
            reference.expanded_attention(
                q[None, ends_q[i] : ends_q[i + 1]],
                c[None, ends_k[i] : ends_k[i + 1]],
                r[None, ends_k[i] : ends_k[i + 1]],
                w,
                num_heads=case.H,
                value_dim=case.V,
                scale=case.scale,
                causal=case.causal,
            )
            for i in range(len(pairs))
        ]
        empty = reference.Attention(q.new_zeros(1, 0, case.H, case.V), q.new_zeros(1, 0, case.H))
        outs, lses = zip(empty, *parts, strict=True)
        return torch.cat(outs, dim=1)[0], torch.cat(lses, dim=1)[0]

    with implementation(name):
        actual, expected = run(inputs), alone(inputs)
        torch.testing.assert_close(actual.out, expected[0])
        torch.testing.assert_close(actual.lse, expected[1])
        if (actual.lse != float("-inf")).any():
            got = gradients(run, [x.clone() for x in inputs], case.seed)
            want = gradients(alone, [x.clone() for x in inputs], case.seed)
            for label, one, other in zip(NAMES, got, want, strict=True):
                torch.testing.assert_close(one, other, msg=lambda text, label=label: label + text)


@BOTH
@settings(max_examples=10)
@given(
    case=prefill_cases(L=35, S=41, dtype=F64),
    expanded=st.sampled_from([1, 300, 2000]),
    scores=st.sampled_from([1, 2000]),
)
def test_groups_of_heads_and_blocks_of_queries_change_nothing(case, expanded, scores, name):
    whole = case.run(case.inputs())
    grads = gradients(case.run, case.inputs(), case.seed)
    with implementation(name, scores, expanded):
        out, lse = case.run(case.inputs())
        again = gradients(case.run, case.inputs(), case.seed)
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)
    for one, other in zip(again, grads, strict=True):
        torch.testing.assert_close(one, other)


@BOTH
@given(case=prefill_cases(causal=True, key_starts=None, key_lengths=None), data=st.data())
def test_a_changed_token_leaves_earlier_queries_bit_for_bit(case, data, name):
    changed = data.draw(st.integers(0, case.S - 1))
    earlier = max(case.L - (case.S - changed), 0)
    with implementation(name):
        before = case.run(case.inputs())
        inputs = case.inputs()
        inputs[1][:, changed] += 1
        inputs[2][:, changed] += 1
        after = case.run(inputs)
    assert torch.equal(before.out[:, :earlier], after.out[:, :earlier])
    assert torch.equal(before.lse[:, :earlier], after.lse[:, :earlier])
    if earlier < case.L:
        assert not torch.equal(before.out[:, earlier:], after.out[:, earlier:])


@BOTH
@pytest.mark.parametrize("which", range(5), ids=[*NAMES, "gradient"])
@pytest.mark.parametrize("V", [3, 6, 9])
def test_strides_do_not_matter(V, which, name):
    """A transposed query made the fused kernel read beyond its memory."""
    case = PrefillCase(
        L=5, S=7, H=3, C=5, N=4, R=2, V=V, causal=True, key_starts=None, key_lengths=None, B=2,
        dtype=F64, seed=0,
    )  # fmt: skip
    inputs, d_out = case.inputs(), randn(2, 5, 3, V, seed=9, dtype=F64)
    strided = [x.clone() for x in (*inputs, d_out)]
    other = strided[which].transpose(0, -1).contiguous().transpose(0, -1)
    assert not other.is_contiguous()
    strided[which] = other
    results = []
    with implementation(name):
        for *tensors, d in ([*inputs, d_out], strided):
            tensors = [x.requires_grad_() for x in tensors]
            out = case.run(tensors).out
            results.append((out, *torch.autograd.grad(out, tensors, d)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_the_backward_pass_keeps_the_latent_and_no_keys_or_values():
    case = PrefillCase(
        L=8, S=8, H=9, C=5, N=8, R=2, V=14, causal=True, key_starts=None, key_lengths=None, B=2,
        dtype=torch.float32, seed=0,
    )  # fmt: skip

    def saved(save: str) -> int:
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        )
        with hooks:
            case.run([x.requires_grad_() for x in case.inputs()], save=save)
        return sum(sizes)

    inputs, (out, lse) = case.inputs(), case.run(case.inputs())
    least = sum(x.numel() for x in (*inputs, out, lse))
    assert saved("latent") == least
    assert saved("expanded") == least + 2 * 8 * 9 * (8 + 14)


def test_gradient_of_one_output_or_one_input_alone():
    case = PrefillCase(
        L=3, S=4, H=2, C=5, N=3, R=2, V=4, causal=True, key_starts=None, key_lengths=None, B=2,
        dtype=F64, seed=0,
    )  # fmt: skip
    for field in ("out", "lse"):
        for which in range(4):
            grads = []
            for run in (case.run, case.oracle):
                inputs = case.inputs()
                inputs[which].requires_grad_()
                loss = getattr(run(inputs), field).square().sum()
                grads += torch.autograd.grad(loss, inputs[which])
            torch.testing.assert_close(*grads)


def test_gradients_of_gradients_are_refused():
    case = PrefillCase(
        L=3, S=3, H=2, C=5, N=3, R=2, V=4, causal=True, key_starts=None, key_lengths=None, B=1,
        dtype=F64, seed=0,
    )  # fmt: skip
    inputs = [x.requires_grad_() for x in case.inputs()]
    (grad,) = torch.autograd.grad(case.run(inputs).out.sum(), inputs[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="gradients of gradients are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_dtype_and_autocast(dtype, out_dtype):
    case = PrefillCase(
        L=3, S=5, H=2, C=5, N=3, R=2, V=4, causal=True, key_starts=None, key_lengths=None, B=2,
        dtype=dtype, seed=0,
    )  # fmt: skip
    plain = gradients(case.run, case.inputs(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(case.run, case.inputs(), 0)
    assert all(torch.equal(*pair) for pair in zip(plain, inside, strict=True))
    cast = gradients(lambda x: case.run(x, out_dtype=out_dtype), case.inputs(), 0)
    bound = 8 * max(torch.finfo(x).eps for x in (dtype, out_dtype))
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == dtype
        largest = one.abs().max().item()
        # Some roundings in the coarser of the two dtypes, of the largest value.
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=bound * largest)


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=["B", "L", "S"])
def test_nothing_to_do(sizes):
    B, L, S = sizes
    case = PrefillCase(
        L=L, S=S, H=2, C=5, N=3, R=2, V=4, causal=True, key_starts=None, key_lengths=None, B=B,
        dtype=torch.float32, seed=0,
    )  # fmt: skip
    inputs = [x.requires_grad_() for x in case.inputs()]
    out, lse = case.run(inputs)
    assert out.shape == (B, L, 2, 4) and (out == 0).all() and (lse == float("-inf")).all()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all((grad == 0).all() for grad in grads)
