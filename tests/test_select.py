"""The support table: what is listed, what runs, and what a refusal says."""

from __future__ import annotations

import re

import pytest
import torch
from strategies import DTYPES

from mla.checks import UnsupportedError
from mla.ops import merge_partials, supported_impls
from mla.ops.select import OPS, TABLE, Case, resolve


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pytorch_runs_everything_on_a_cpu(op, dtype):
    for codec in ("plain", "fp8", "int8", "int4"):
        assert ("torch", None) in supported_impls(op, device="cpu", dtype=dtype, codec=codec)
        assert resolve("torch", Case(op, "cpu", dtype, codec)).name == "torch"


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_first_that_can_run(op):
    """Of those meant for the device: an interpreter of GPU kernels is only taken by name."""
    for device in ("cpu", "cuda"):
        able = [name for name, reason in supported_impls(op, device=device) if reason is None]
        meant = [row.name for row in TABLE if not row.devices or device in row.devices]
        assert resolve("auto", Case(op, device)).name == next(n for n in able if n in meant)


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
