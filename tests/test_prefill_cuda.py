"""`impl="torch"` of prefill on CUDA: PyTorch's flash attention there, with its log-sum-exp.

Without a device its two ops are played by those for CPUs, so that everything around them is
tested; the signatures of the real ones are tried on meta tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_lse_within_budget, assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prefill import F64, NAMES, PrefillCase, gradients, prefill_cases

from mla.kernels.eager import flash
from mla.ops import mla_prefill

CASES = st.builds(replace, prefill_cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
ATEN = torch.ops.aten


@pytest.mark.parametrize("width", [192, 20, 5])
def test_the_ops_take_what_they_are_given(width):
    q = torch.empty(2, 3, 40, width, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 3, 70, width, device="meta", dtype=torch.bfloat16)
    out, lse = flash.cuda_forward(q, k, k, False, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 40), torch.float32)
    grads = flash.cuda_backward(out, q, k, k, out, lse, False, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.fixture
def played_by_a_cpu(monkeypatch):
    name = "_scaled_dot_product_flash_attention"
    attend, backward = getattr(ATEN, f"{name}_for_cpu"), getattr(ATEN, f"{name}_for_cpu_backward")

    def cuda_attend(q, k, v, dropout, causal, *, scale):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        assert not causal or q.shape[2] == k.shape[2]
        return *attend(q, k, v, dropout, causal, scale=scale), None, None, 0, 0, None, None, None

    def cuda_backward(d_out, q, k, v, out, lse, cu_q, cu_k, L, S, dropout, causal, *state, scale):
        assert (q.shape[2], k.shape[2]) == (L, S) and cu_q is None and cu_k is None
        assert all(x.stride(-1) == 1 for x in (d_out, q, k, v, out)) and lse.is_contiguous()
        return backward(d_out, q, k, v, out, lse, dropout, causal, scale=scale)

    monkeypatch.setattr(ATEN, name, cuda_attend)
    monkeypatch.setattr(ATEN, f"{name}_backward", cuda_backward)
    monkeypatch.setattr("mla.kernels.eager.prefill.flash_forward", flash.cuda_forward)
    monkeypatch.setattr("mla.kernels.eager.prefill.flash_backward", flash.cuda_backward)


def check(case: PrefillCase, device: str = "cpu") -> None:
    masking = {name: None if x is None else x.to(device) for name, x in case.masking().items()}
    options = {"scale": case.scale, "causal": case.causal, "impl": "torch", **masking}

    def run(inputs):
        out, lse = mla_prefill(*(x.to(device) for x in inputs), **options)
        return out.cpu(), lse.cpu()

    inputs = case.inputs()
    for tensor in inputs[1:3]:
        tensor.masked_fill_(case.unseen()[..., None], float("nan"))
    oracle, plain = case.oracle(case.inputs(F64)), case.oracle(case.inputs())
    out, lse = run(inputs)
    assert_within_budget(out, oracle.out, plain.out, "out")
    assert_lse_within_budget(lse, oracle.lse, plain.lse)
    least = 4 * (case.H * case.V) ** 0.5
    actual = gradients(run, inputs, case.seed)
    oracle_grads = gradients(case.oracle, case.inputs(F64), case.seed)
    plain_grads = gradients(case.oracle, case.inputs(), case.seed)
    for name, *grads in zip(NAMES, actual, oracle_grads, plain_grads, strict=True):
        assert_within_budget(*grads, f"gradient of {name}", least=least)


@settings(suppress_health_check=[*HealthCheck])
@given(case=CASES)
def test_around_the_ops_everything_is_right(played_by_a_cpu, case):
    check(case)


@pytest.mark.cuda
@given(case=CASES)
def test_on_a_device_it_matches_the_oracle(case):
    assert flash.is_fused_on_cuda(torch.empty(1, 8, device="cuda", dtype=case.dtype))
    check(case, "cuda")


def test_nothing_on_a_cpu_is_taken_for_cuda():
    assert not flash.is_fused_on_cuda(torch.empty(1, 8, dtype=torch.bfloat16))
