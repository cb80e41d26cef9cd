"""`python -m mla check`: passes on what is right, and names the convention that was broken."""

import json
import math

import pytest
import torch

import mla
from mla.__main__ import main
from mla.absorb import KeyValueWeights
from mla.cli.check import conformance
from mla.cli.check_conventions import conventions_of, wrong_conventions
from mla.cli.check_setup import SMALL, Setup, config_of
from mla.presets import PRESETS
from mla.rope import inverse_frequencies

SETUP = Setup(SMALL, torch.device("cpu"), torch.float32)


def failures(setup: Setup = SETUP) -> dict[str, list[str]]:
    """Stages that fail, each with all explanations of its cases."""
    found: dict[str, list[str]] = {}
    for answer in conformance(setup):
        if not answer.passed:
            found.setdefault(answer.stage.partition("[")[0], []).extend(answer.explanations)
    return found


def break_kernel(monkeypatch, op: str, wrap) -> None:
    """Let every implementation of ``op`` be what ``wrap`` makes of it."""
    for module in (mla.ops.decode, mla.ops.prefill, mla.ops.append, mla.ops.merge):
        kernel_for = module.kernel_for

        def broken(impl, case, part=None, kernel_for=kernel_for):
            kernel = kernel_for(impl, case, part)
            return wrap(kernel) if case.op == op and part is None else kernel

        monkeypatch.setattr(module, "kernel_for", broken)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_this_build_passes(dtype, capsys):
    assert main(["check", "--dtype", dtype, "--seed", "3"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("check: passed, ") and last.endswith(f"on cpu in {dtype}")


@pytest.mark.parametrize("preset", ["minicpm3-4b"])
def test_presets_pass(preset, capsys):
    assert main(["check", "--preset", preset]) == 0
    assert preset in capsys.readouterr().out.splitlines()[0]


def test_one_implementation_can_be_named(capsys):
    assert main(["check", "--impl", "torch"]) == 0
    out = capsys.readouterr().out
    assert "decode[torch]" in out and "layer[torch]" in out and "[auto]" not in out
    assert main(["check", "--impl", "triton", "--dtype", "float64"]) == 2
    assert "impl has value 'triton', which runs no op on cpu" in capsys.readouterr().err


def test_json_lists_every_comparison(capsys):
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["comparisons"]) > 40
    stages = {comparison["stage"].partition("[")[0] for comparison in report["comparisons"]}
    assert stages == {
        *(
            "rope",
            "norm",
            "scale",
            "absorb",
            "append",
            "gather",
            "decode",
            "prefill",
            "merge",
            "layer",
        )
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_conventions_agree_with_the_package_on_presets(preset):
    config = config_of(preset)
    right = conventions_of(config)
    assert right.scale == pytest.approx(config.scale, rel=1e-14)
    assert right.amplitude == pytest.approx(config.rope.amplitude, rel=1e-14)
    found = inverse_frequencies(config.rope, config.qk_rope_head_dim, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(right.inv_freq, dtype=torch.float64))


def test_every_mistake_differs_from_the_truth():
    words = [words for words, _ in wrong_conventions(SMALL)]
    assert len(words) == len(set(words)) > 40
    right = conventions_of(SMALL)
    assert all(wrong != right for _, wrong in wrong_conventions(SMALL))


def test_wrong_pairing_is_named(monkeypatch):
    rotate = mla.rope.rotate

    def broken(x, cos, sin, pairing):
        return rotate(x, cos, sin, "half")

    monkeypatch.setattr(mla.rope, "rotate", broken)
    monkeypatch.setattr(mla.module, "rotate", broken)
    found = failures()
    assert set(found) == {"rope", "layer"}
    for stage in ("rope", "layer"):
        assert set(found[stage]) == {"pairs are half-split, (x0, x[R/2]), not interleaved"}


def test_scale_without_mscale_is_named(monkeypatch):
    monkeypatch.setattr(mla.MLAConfig, "scale", property(lambda self: self.qk_head_dim**-0.5))
    found = failures()
    assert set(found) == {"scale", "layer"}
    for explanations in found.values():
        assert "the scale is (N+R)^-0.5 without mscale^2" in explanations


def test_scale_of_the_unrotated_width_is_named(monkeypatch):
    right = conventions_of(SMALL).scale * SMALL.qk_head_dim**0.5
    monkeypatch.setattr(
        mla.MLAConfig, "scale", property(lambda self: right * self.qk_nope_head_dim**-0.5)
    )
    assert "the scale is N^-0.5 times mscale^2" in failures()["layer"]


def test_order_of_kv_b_rows_is_named(monkeypatch):
    def broken(weight, H, N, V):
        by_head = weight.view(H, N + V, -1)
        return KeyValueWeights(by_head[:, V:], by_head[:, :V])

    monkeypatch.setattr(mla.absorb, "split_kv_b", broken)
    monkeypatch.setattr(mla.module, "split_kv_b", broken)
    found = failures()
    assert set(found["absorb"]) == {"kv_b_proj has the value rows of a head before its key rows"}
    assert set(found) == {"absorb", "layer"}


@pytest.mark.parametrize(
    ("changes", "stage", "words"),
    [
        ({"latent_norm_eps": 1e-5}, "norm", "the latent norm's eps is 1e-05"),
        ({"query_norm_eps": 1e-5}, "norm", "the query norm's eps is 1e-05"),
        ({"latent_scale": 1.0}, "norm", "the latent's factor is left out"),
        ({"query_scale": 1.0}, "rope", "the queries' factor is left out"),
    ],
)
def test_wrong_field_of_the_layer_is_named(monkeypatch, changes, stage, words):
    layer_class = mla.module.MultiheadLatentAttention

    def broken(config, **options):
        return layer_class(mla.MLAConfig.from_dict({**config.to_dict(), **changes}), **options)

    monkeypatch.setattr(mla.cli.check_setup, "MultiheadLatentAttention", broken)
    assert words in failures()[stage]


def test_unscaled_frequencies_are_named(monkeypatch):
    monkeypatch.setattr(mla.rope, "_yarn", lambda rope, R, powers: 1.0 / powers)
    mla.rope._kept_table.cache_clear()
    found = failures()
    mla.rope._kept_table.cache_clear()
    assert "frequencies are not scaled for the longer context" in found["rope"]
    assert "frequencies are not scaled for the longer context" in found["layer"]


def test_base_two_lse_is_named(monkeypatch):
    def wrap(decode):
        def broken(*arguments):
            out, lse = decode(*arguments)
            return out, lse / math.log(2)

        return broken

    break_kernel(monkeypatch, "mla_decode", wrap)
    found = failures()
    assert set(found) == {"decode", "merge"}
    assert set(found["decode"]) == {"the log-sum-exp is in base 2"}


def test_top_left_mask_is_named(monkeypatch):
    def wrap(prefill):
        def broken(query, latent, k_rope, weight, scale, masking, *rest):
            if masking.key_lengths is None and masking.cu_seqlens_q is None:
                latent, k_rope = (x[:, : query.shape[1]] for x in (latent, k_rope))
            return prefill(query, latent, k_rope, weight, scale, masking, *rest)

        return broken

    break_kernel(monkeypatch, "mla_prefill", wrap)
    assert "the causal mask is aligned top-left, not bottom-right" in failures()["prefill"]


def test_missing_causal_mask_is_named(monkeypatch):
    def wrap(prefill):
        def broken(query, latent, k_rope, weight, scale, masking, *rest):
            masking = masking._replace(causal=False)
            return prefill(query, latent, k_rope, weight, scale, masking, *rest)

        return broken

    break_kernel(monkeypatch, "mla_prefill", wrap)
    found = failures()
    assert "there is no causal mask" in found["prefill"]
    assert "there is no causal mask" in found["layer"]


def test_averaged_parts_are_named(monkeypatch):
    break_kernel(
        monkeypatch,
        "merge_partials",
        lambda merge: lambda out, lse: (out.mean(0), torch.logsumexp(lse, 0)),
    )
    assert "parts are averaged, not weighted by log-sum-exp" in failures()["merge"]


def test_order_of_a_row_is_named(monkeypatch):
    def broken(self, latent, k_rope):
        return torch.cat([k_rope, latent], dim=-1)

    monkeypatch.setattr(mla.PlainCodec, "encode", broken)
    assert failures()["append"] == ["rows hold the rotated key before the latent"]


def test_order_of_nibbles_is_named(monkeypatch):
    pack, unpack = mla.Int4Codec._pack, mla.Int4Codec._unpack

    def swap(packed):
        return (packed >> 4) | (packed << 4)

    monkeypatch.setattr(mla.Int4Codec, "_pack", lambda self, values: swap(pack(self, values)))
    monkeypatch.setattr(mla.Int4Codec, "_unpack", lambda self, x, C: unpack(self, swap(x), C))
    found = failures()
    for stage in ("append", "gather"):
        assert set(found[stage]) == {"4-bit values have the even one in the high nibble"}


def test_positions_that_restart_are_named(monkeypatch):
    monkeypatch.setattr(
        mla.module,
        "default_positions",
        lambda hidden_states, *rest: torch.arange(hidden_states.shape[1]),
    )
    assert "positions start again at 0 in each chunk" in failures()["layer"]


def test_a_step_that_raises_or_gives_nan_is_a_failure(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no kernel\nfor this device")

    def empty(merge):
        return lambda out, lse: (out[0] * math.nan, lse[0])

    break_kernel(monkeypatch, "mla_decode", lambda decode: broken)
    break_kernel(monkeypatch, "merge_partials", empty)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert any("raises RuntimeError: no kernel for this device" in line for line in lines)
    assert any("has values that are not finite" in line for line in lines)
    assert lines[-1].startswith("check: failed on cpu in float32: ")


@pytest.mark.parametrize("device", ["cuda:77", "meta", "abacus"])
def test_a_device_that_is_not_there_is_one_line(device, capsys):
    assert main(["check", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mla: error: --device has value '{device}'")
    assert error.count("\n") == 1
