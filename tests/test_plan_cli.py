"""`python -m mla plan`: its numbers are those of the functions, and bad input is one line."""

import json
import math

import pytest

from mla.__main__ import main
from mla.cli import options as values
from mla.cli.plan_text import si

V3 = ["plan", "--model", "deepseek-v3", "--context", "128k", "--gpu", "h100", "--codec", "fp8"]
CPU = ["--gpu", "cpu", "--bandwidth", "20G", "--flops", "1T", "--memory", "16G"]


def facts(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_deepseek_v3_on_one_h100(capsys, tmp_path):
    found = facts(capsys, *V3, "--price-per-hour", "2.5", "--rows", str(tmp_path))
    assert found["cache"]["bytes_per_token"] == 61 * 656
    assert found["cache"]["bytes_per_sequence"] == 131_072 * 61 * 656
    assert found["cache"]["is_all_memory"] and len(found["groups"]) == 1
    (one,) = found["groups"]
    assert one["sequences_that_fit"] == 15 and one["measured_rows"] == []
    assert one["seconds"] == pytest.approx(9.0653e-3, rel=1e-4)
    assert one["seconds_per_token_and_layer"] == pytest.approx(one["seconds"] / 61)
    # 110.3 tokens a second, 397,118 an hour.
    assert one["cost_per_million_tokens"] == pytest.approx(2.5 / 0.397118, rel=1e-4)
    assert one["bytes_sent"] == one["prefill_bytes_sent"] == 0


def test_groups_share_heads_or_tokens_or_both(capsys):
    found = facts(capsys, *V3, "--tensor-parallel", "8", "--context-parallel", "4")
    groups = {(one["tensor"], one["context"]): one for one in found["groups"]}
    assert list(groups) == [(1, 1), (8, 1), (1, 4), (8, 4)]
    sizes = [one["cache_bytes"] for one in groups.values()]
    assert sizes == [sizes[0], sizes[0], sizes[0] // 4, sizes[0] // 4]
    assert [one["sequences_that_fit"] for one in groups.values()] == [15, 15, 61, 61]
    assert groups[8, 1]["all_reduce"]["payload"] == 61 * 14_336
    assert groups[1, 4]["all_gather"]["payload"] == 61 * 128 * 129 * 4
    assert groups[8, 4]["prefill_bytes_sent"] == 61 * 3 * 32_768 * 576 * 2
    total = [one["seconds"] for one in groups.values()]
    assert min(total) == total[-1]


def test_splits_of_8_to_512_devices(capsys):
    found = facts(capsys, *V3, "--batch", "64", "--devices", "1,8,64,512")
    first, *others = found["splits"]
    assert first == {"devices": 1, "fits": False}
    for one in others:
        assert one["data"] * one["tensor"] * one["context"] == one["devices"]
        assert one["cache_bytes"] <= 80e9
    speeds = [one["tokens_per_second"] for one in others]
    assert speeds == sorted(speeds)
    assert main([*V3, "--batch", "64", "--devices", "1,8"]) == 0
    assert "1: does not fit" in capsys.readouterr().out


def test_the_text_names_the_scope_the_source_and_the_messages(capsys, tmp_path):
    arguments = [*V3, "--tensor-parallel", "8", "--price-per-hour", "2.5", "--rows", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for part in (
        "deepseek-v3: 61 MLA layers, fp8 rows",
        "NVIDIA H100 data sheet",
        "40,016 bytes, 656 a layer",
        "8 = tensor 8",
        "Times are the bound: nothing like them has been measured.",
        "messages one after another in a step: 8 = tensor 8: 854",
        "Attention layers alone, without embeddings, MLPs and experts",
        "--memory-for-cache is what weights leave",
        "cost of 1M tokens",
    ):
        assert part in out
    assert main([*arguments, "--latency", "2", "--memory-for-cache", "1G"]) == 0
    out = capsys.readouterr().out
    assert "messages one after" not in out and "The cache does not fit: 1 device" in out


def test_measured_rows_scale_attention_and_are_named(capsys, tmp_path):
    row = {
        "dtype": "bfloat16",
        "H": "128",
        "B": "1",
        "S": "16384",
        "impl": "cpp",
        "cpu_ms": "6.0",
        "share": "0.5",
        "device": "A processor",
        "threads": "2",
    }
    (tmp_path / "cpu.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    asked = ["plan", "--model", "deepseek-v3", "--context", "16k", *CPU, "--rows"]
    (found,) = facts(capsys, *asked, str(tmp_path))["groups"]
    (bound,) = facts(capsys, *asked, str(tmp_path.parent))["groups"]
    assert found["attention"]["seconds"] == pytest.approx(2 * bound["attention"]["seconds"])
    assert found["projections"] == bound["projections"]
    assert main([*asked, str(tmp_path)]) == 0
    text = "measured share 0.50 of arithmetic: cpp, plain, bfloat16, H=128 B=1 S=16384"
    out = capsys.readouterr().out
    assert text in out and "benchmarks.check_plan shows how far such shares are off" in out


def test_a_folder_with_a_config_is_a_model(capsys, tmp_path):
    config = {
        "model_type": "deepseek_v3",
        "rope_interleave": True,
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = facts(capsys, "plan", "--model", str(tmp_path), "--context", "100")
    assert found["layers"] == 3 and found["cache"]["bytes_per_token"] == 3 * 40 * 2


def test_limits_of_a_data_sheet_can_be_replaced(capsys):
    device = facts(capsys, *V3, "--bandwidth", "3T", "--link", "pcie5")["device"]
    assert device["bytes_per_second"] == 3e12 and device["flops_per_second"] == 989.4e12
    assert device["link"]["name"] == "PCIe 5 x16" and "changed as given" in device["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model has value 'gpt', expected a folder or one of"),
        (["--gpu", "cpu", "--memory", "1G"], "--gpu cpu needs --bandwidth, --flops"),
        (["--dtype", "float32"], "--dtype float32 needs --flops"),
        (["--tensor-parallel", "3"], "expected a divisor of 128 heads"),
        (["--new-tokens", "200000"], "expected at most context_length = 131072"),
        (["--rows", "no/such/folder"], "--rows has value 'no/such/folder'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main([*V3, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mla: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "has value 0, expected at least 1"),
        (["--context", "1.5k"], "has value '1.5', expected an integer"),
        (["--bandwidth", "fast"], "has value 'fast', expected a number"),
        (["--memory=-1G"], "has value -1G, expected a finite number above 0"),
        (["--devices", "8,0"], "has value 0, expected at least 1"),
        (["--gpu", "h1000"], "invalid choice"),
    ],
)
def test_values_out_of_range_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main([*V3, *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_values_have_units():
    assert [values.context(text) for text in ("32768", "128k", "1M")] == [32768, 131072, 1048576]
    assert [values.quantity(text) for text in ("3.35T", "80G", "5", "2k")] == [
        3.35e12,
        80e9,
        5,
        2e3,
    ]
    assert values.positives("8,64,512") == [8, 64, 512]
    shown = {9.0653e-3: "9.07 m", 5244977152: "5.24 G", 1.5e-7: "150 n", 0: "0 ", 12.3: "12.3 "}
    assert {value: si(value) for value in shown} == shown
    assert math.isclose(float(si(0.99999e-3).split()[0]), 1e3)
