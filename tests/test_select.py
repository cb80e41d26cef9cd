"""The support table: what is listed, what runs, and what a refusal says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from strategies import DTYPES

from mla.checks import UnsupportedError
from mla.ops import merge_partials, select, supported_impls
from mla.ops.select import OPS, TABLE, Case, Win, reason_not_auto, resolve


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pytorch_runs_everything_on_a_cpu(op, dtype):
    for codec in ("plain", "fp8", "int8", "int4"):
        assert ("torch", None) in supported_impls(op, device="cpu", dtype=dtype, codec=codec)
        assert resolve("torch", Case(op, "cpu", dtype, codec)).name == "torch"


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_first_that_can_run(op):
    """Of those it does not pass over, as it does an interpreter of GPU kernels on a CPU."""
    for device in ("cpu", "cuda"):
        able = [name for name, reason in supported_impls(op, device=device) if reason is None]
        case = Case(op, device)
        first = next(name for name in able if reason_not_auto(name, case) is None)
        assert resolve("auto", case).name == first
        assert all(reason_not_auto(name, case) for name in able[: able.index(first)])


BF16, WIDTHS = torch.bfloat16, (192, 128)


@pytest.fixture
def on_sm90(monkeypatch):
    """Dispatch as on a machine with an H100: Triton and plain PyTorch run everything."""
    pytest.importorskip("triton")
    table = [replace(row, reason_not=lambda case: None) for row in TABLE if row.name != "cpp"]
    monkeypatch.setattr(select, "TABLE", tuple(table))
    monkeypatch.setattr("mla.kernels.launch.architecture", lambda device: "sm90")
    resolve.cache_clear()
    yield
    resolve.cache_clear()


def prefill_case(**changes) -> Case:
    case = Case("mla_prefill", "cuda", BF16, widths=WIDTHS, num_keys=8192)
    return case._replace(**changes)


def test_auto_leaves_prefill_to_sdpa_until_it_was_timed(on_sm90, monkeypatch):
    """The list is empty in the tree as long as no measurement stands behind it."""
    monkeypatch.setattr(select, "PREFILL_WINS", ())
    case = prefill_case()
    assert resolve("auto", case).name == "torch"
    assert resolve("triton", case).name == "triton", "a named one runs"
    assert supported_impls("mla_prefill", device="cuda") == [("triton", None), ("torch", None)]
    reason = "not yet timed against SDPA on sm90; runs on request"
    assert reason_not_auto("triton", case) == reason
    assert reason_not_auto("torch", case) is None
    assert resolve("auto", Case("mla_decode", "cuda", BF16)).name == "triton"


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "triton"),
        ({"num_keys": 16384}, "triton"),
        ({"num_keys": 4096}, "torch"),
        ({"widths": (128, 128)}, "torch"),
        ({"dtype": torch.float16}, "torch"),
    ],
)
def test_auto_takes_triton_for_prefill_where_it_was_faster(on_sm90, monkeypatch, changes, taken):
    monkeypatch.setattr(select, "PREFILL_WINS", (Win("sm90", BF16, WIDTHS, 8192),))
    case = prefill_case(**changes)
    assert resolve("auto", case).name == taken
    expected = None if taken == "triton" else "not measured to be faster than SDPA on sm90"
    assert (reason_not_auto("triton", case) or "None").startswith(str(expected))
    monkeypatch.setattr("mla.kernels.launch.architecture", lambda device: "sm80")
    resolve.cache_clear()
    assert resolve("auto", case).name == "torch"


def test_forward_and_backward_of_prefill_make_the_same_choice(monkeypatch):
    from mla.ops import mla_prefill, prefill

    asked = []

    def kernel_for(impl, case, part=None):
        asked.append(case)
        return select.kernel_for(impl, case, part)

    monkeypatch.setattr(prefill, "kernel_for", kernel_for)
    query = torch.randn(5, 2, 6, requires_grad=True)  # N + R = 6
    boundaries = torch.tensor([0, 3, 5], dtype=torch.int32)
    out = mla_prefill(
        query,
        torch.randn(5, 8),
        torch.randn(5, 2),
        torch.randn(2 * (4 + 3), 8),
        scale=0.3,
        cu_seqlens_q=boundaries,
        max_q=3,
        max_k=3,
    ).out
    out.sum().backward()
    assert asked == [Case("mla_prefill", "cpu", torch.float32, "plain", (6, 3), 3)] * 2


def test_every_op_lists_its_rows_in_the_order_of_the_table():
    for op in OPS:
        names = [name for name, _ in supported_impls(op)]
        assert names == [row.name for row in TABLE if op in row.ops] and names


def test_the_choice_is_pure():
    case = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "codec": "int8"}
    assert supported_impls("mla_decode", **case) == supported_impls("mla_decode", **case)


def test_a_dtype_that_nothing_computes():
    (*_, (name, reason)) = supported_impls("mla_decode", dtype=torch.int64)
    assert name == "torch" and "needs a floating dtype, got torch.int64" in reason
    with pytest.raises(UnsupportedError, match="torch needs a floating dtype"):
        resolve("auto", Case("mla_decode", "cpu", torch.int64))
    with pytest.raises(UnsupportedError, match=re.escape("impl='torch' needs a floating dtype")):
        resolve("torch", Case("mla_decode", "cpu", torch.int64))


def test_an_impl_that_does_not_exist():
    message = re.escape("merge_partials: impl='fast' does not exist for this op; this case can run")
    with pytest.raises(UnsupportedError, match=message):
        merge_partials(torch.ones(2, 1, 1), torch.ones(2, 1), impl="fast")


def test_an_op_that_does_not_exist():
    with pytest.raises(UnsupportedError, match="supported_impls: op has value 'mla_sparse'"):
        supported_impls("mla_sparse")
