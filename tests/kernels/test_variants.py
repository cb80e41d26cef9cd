"""Every promised kernel compiles for its target, fits it, and spills no more than was recorded.

The compiler needs no device, but a process without the interpreter. By default the kernels that
most models use, on every target; the whole list is behind the marker ``slow``.
"""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.compiler")

from mla.__main__ import main
from mla.cli.compile import ARCHITECTURES, FAMILIES
from mla.codec import Fp8Codec, Int4Codec, PlainCodec
from mla.kernels import launch
from mla.kernels.variant_types import Variant
from mla.kernels.variants import SPILLS, TARGETS, Report, compile_variant, variants

pytestmark = pytest.mark.compiles

VARIANTS = list(variants())
USUAL = ("decode plain bfloat16 H=16 C=512 R=64 16x32", "append fp8", "merge")
ON_SM90 = (
    "decode fp8 bfloat16 H=16",
    "decode int4 bfloat16 H=16",
    "decode plain bfloat16 H=128 C=512 R=64 64x32",
    "decode fp8 bfloat16 H=128",
    "decode int4 bfloat16 H=128",
    "prefill forward bfloat16 N=128 R=64 V=128",
    "prefill keys bfloat16 N=128 R=64 V=128",
    "prefill queries bfloat16 N=128 R=64 V=128",
)


def is_usual(variant: Variant) -> bool:
    names = (*USUAL, *ON_SM90) if variant.architecture == "sm90" else USUAL
    return variant.name.startswith(names) and not variant.name.endswith("full")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            variant,
            id=f"{variant.architecture}-{variant.name}".replace(" ", "_"),
            marks=[] if is_usual(variant) else [pytest.mark.slow],
        )
        for variant in VARIANTS
    ],
)
def test_compiles_and_keeps_its_promise(variant: Variant) -> None:
    assert not compile_variant(variant).complaints(variant)


def test_names_are_unique_and_every_family_is_on_every_target() -> None:
    keys = [(variant.architecture, variant.name) for variant in VARIANTS]
    assert len(keys) == len(set(keys))
    pairs = {(variant.architecture, variant.family) for variant in VARIANTS}
    assert pairs == {(target, family) for target in ARCHITECTURES for family in FAMILIES}
    assert set(TARGETS) == set(ARCHITECTURES)


def test_no_kernel_is_compiled_again_when_a_size_of_the_run_changes() -> None:
    """Only strides and what a model fixes are specialised, as 1 or as a multiple of 16."""
    kernels = {variant.kernel for variant in VARIANTS}
    found = {
        param.name
        for kernel in kernels
        for param in kernel.params
        if not (param.is_constexpr or param.do_not_specialize)
        and not param.name.endswith("_ptr")
        and "stride" not in param.name
    }
    # One query is a case of its own; the rows of a weight are a model's; floats are never.
    assert found == {"L", "O", "scale", "eps", "latent_scale", "rotation_scale"}


def test_spills_have_a_reason() -> None:
    assert all(variant.reason for variant in VARIANTS if variant.spill_bytes)


def test_wgmma_is_promised_for_64_rows_on_sm90() -> None:
    wide = [v for v in VARIANTS if v.architecture == "sm90" and v.constants.get("BLOCK_H") == 64]
    assert len(wide) >= 5
    assert all(variant.mma == "wgmma" for variant in wide)


@pytest.mark.parametrize("kind", ["plain", "fp8", "int4"])
@pytest.mark.parametrize("H", [16, 128])
def test_every_part_of_a_row_is_fetched_ahead_on_sm90(kind: str, H: int) -> None:
    """What is not fetched ahead has no buffer: the report would be below what the plan expects."""
    variant = next(
        v for v in VARIANTS
        if v.architecture == "sm90" and v.name.startswith(f"decode {kind} bfloat16 H={H} C=512")
    )  # fmt: skip
    codec = {"plain": PlainCodec(), "fp8": Fp8Codec(), "int4": Int4Codec()}[kind]
    plan = launch.decode_plan("sm90", H, 512, 64, torch.bfloat16, codec)
    expected = launch.shared_bytes("sm90", plan, 64, torch.bfloat16, codec)
    twice = launch.shared_bytes("sm90", plan._replace(ONCE=0), 64, torch.bfloat16, codec)
    assert twice - 1024 <= compile_variant(variant).shared <= expected


@pytest.mark.parametrize(
    ("architecture", "H", "once"),
    [("sm90", 16, 2), ("sm90", 128, 0), ("sm80", 16, 4), ("sm86", 16, 0), ("gfx942", 16, 0)],
)
def test_codes_are_converted_once_where_that_costs_no_block(architecture, H, once) -> None:
    plan = launch.decode_plan(architecture, H, 512, 64, torch.bfloat16, Fp8Codec())
    assert once == plan.ONCE
    for codec, dtype in ((PlainCodec(), torch.bfloat16), (Fp8Codec(), torch.float32)):
        assert launch.decode_plan(architecture, H, 512, 64, dtype, codec).ONCE == 0


def test_warp_groups_share_the_scores_of_64_rows() -> None:
    """Each of two warp groups computes half: (512 + 64) / 16 products of scores, 2 * 2 of values.

    Without the branch around the scores Triton gives all of them to both groups, 72 products.
    """
    (variant,) = (
        v for v in VARIANTS
        if v.architecture == "sm90" and v.name == "decode plain bfloat16 H=128 C=512 R=64 64x32"
    )  # fmt: skip
    assert compile_variant(variant).num_mma == 36 + 4


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"shared": 101}, "101 bytes of shared memory, limit 100"),
        ({"tensor_memory": 528}, "528 columns of tensor memory, limit 512"),
        ({"spill_bytes": 5}, "5 bytes spilled, recorded 4"),
        ({"mma": "mma.sync"}, "matrix instruction mma.sync, promised wgmma"),
    ],
)
def test_a_broken_promise_is_named(changed: dict, complaint: str | None) -> None:
    variant = Variant("k", None, "sm90", {}, {}, 4, 2, 4, "because", "wgmma")
    report = Report(100, 100, 512, 255, 4, "wgmma", 40)._replace(**changed)
    assert report.complaints(variant) == ([] if complaint is None else [complaint])


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("codec", [PlainCodec(), Fp8Codec(), Int4Codec()], ids=lambda c: c.kind)
@pytest.mark.parametrize("C", [40, 512, 1024])
def test_plans_of_any_width_fit_the_target(architecture: str, codec, C: int) -> None:
    for num_rows in (1, 16, 20, 128):
        for dtype in (torch.bfloat16, torch.float32):
            plan = launch.decode_plan(architecture, num_rows, C, 64, dtype, codec)
            taken = launch.shared_bytes(architecture, plan, 64, dtype, codec)
            limit = launch.SHARED_LIMIT[architecture]
            assert taken <= limit or (plan.BLOCK_S == 16 and plan.num_stages <= 2)
            assert plan.T * plan.W >= C


def test_the_command_prints_one_line_for_each_kernel(capsys: pytest.CaptureFixture) -> None:
    assert main(["compile", "--arch", "sm80", "--only", "merge"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert "merge" in out[-2] and out[-2].endswith("ok")
    assert out[-1].startswith("compile: passed, 1 kernels with Triton ")


def test_the_command_fails_where_a_promise_is_broken(monkeypatch, capsys) -> None:
    monkeypatch.setitem(launch.SHARED_LIMIT, "sm80", 0)
    assert main(["compile", "--arch", "sm80", "--only", "merge", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (row,) = document["variants"]
    assert not document["passed"] and "shared memory, limit 0" in row["complaints"][0]


def test_recorded_spills_belong_to_promised_kernels() -> None:
    promised = {(variant.architecture, variant.name) for variant in VARIANTS}
    assert set(SPILLS) <= promised
