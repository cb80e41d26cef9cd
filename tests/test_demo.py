"""`python -m mla demo`: report, table and plot, on a tiny model and, reduced, on the real one."""

import json
import math

import pytest
import torch
from cli_models import llama_folder, text_file, tiny_llama

from mla import Int4Codec, MLAConfig, RopeConfig
from mla.__main__ import main
from mla.cli.costs import arithmetic, cached_bytes, crossover_text
from mla.cli.plot import write_plot
from mla.cli.speed import decode_speeds, num_steps

SMALL_SIZES = {
    "--tokens": 64,
    "--windows": 2,
    "--window": 32,
    "--contexts": [24, 40],
    "--steps": 2,
    "--max-new-tokens": 4,
}


def demo_arguments(model, calibration, evaluation, out, sizes) -> list[str]:
    given = {"--model": model, "--calibration": calibration, "--evaluation": evaluation}
    arguments = ["demo", "--out", str(out)]
    for name, value in {**given, **sizes}.items():
        values = value if isinstance(value, list) else [value]
        arguments += [name, *map(str, values)]
    return arguments


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """Arguments and result of a demo on a tiny random Llama."""
    folder = tmp_path_factory.mktemp("demo")
    model = llama_folder(folder / "llama")
    calibration = text_file(folder / "calibration.txt", seed=1)
    evaluation = text_file(folder / "evaluation.txt", seed=2)
    arguments = demo_arguments(model, calibration, evaluation, folder / "out", SMALL_SIZES)
    arguments += ["--prompt", "w1 w2 w3"]
    assert main(arguments) == 0
    return arguments, folder / "out"


def test_demo_writes_report_plot_and_model(tiny_demo):
    _, out = tiny_demo
    report = json.loads((out / "report.json").read_text())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model" / "config.json").exists()
    sizes = report["bytes_per_token"]
    assert sizes["original"] == {"bits16": 2 * 2 * 2 * 16 * 2, "stored": 2 * 2 * 2 * 16 * 4}
    assert sizes["converted"]["bits16"] == 0.75 * sizes["original"]["bits16"]
    assert set(report["decode"]) == {"24", "40"}
    assert all(len(times) == 2 for times in report["decode"]["40"]["rounds"].values())
    assert set(report["continuation"]) == {"original", "converted"}
    assert len(report["layers"]) == 2


def test_demo_runs_again_over_its_own_output_and_ends_with_one_line(tiny_demo, capsys):
    arguments, out = tiny_demo
    assert main([*arguments, "--windows", "1"]) == 0
    text = capsys.readouterr().out
    last = text.strip().splitlines()[-1]
    assert last.startswith("demo: done in ") and "75.0% of the bytes, perplexity x " in last
    assert "multiply-adds a cached token and layer" in text and "crossover" in text
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"]["ratio_standard_error"] is None  # one window has no spread


def test_a_full_budget_changes_nothing(tiny_demo, tmp_path):
    arguments, _ = tiny_demo
    assert main([*arguments, "--kv-budget", "1", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["perplexity"]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert report["continuation"]["original"] == report["continuation"]["converted"]


def test_coded_rows_are_shown_beside_the_plain_ones(tiny_demo, tmp_path, capsys):
    arguments, _ = tiny_demo
    assert main([*arguments, "--codec", "int4", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    coded, layers = report["coded"], report["layers"]
    widths = [Int4Codec().row_width(layer["latent_dim"], layer["rope_dim"]) for layer in layers]
    assert coded["bytes_per_token"] == sum(widths)
    assert coded["codec"] == Int4Codec().spec
    assert coded["original"] == report["perplexity"]["original"]
    assert coded["converted"] != report["perplexity"]["converted"]
    assert set(report["continuation"]) == {"original", "converted", "int4"}
    text = capsys.readouterr().out
    assert "perplexity, int4/64/16/1 rows" in text
    assert "with int4/64/16/1 rows" in text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("int5", "has value 'int5', expected one of ('plain', 'fp8', 'int8', 'int4')"),
        ("int4/7/16/1", "group has value 7, expected a power of two of at least 16"),
        ("int8/128/4/0", "rope_bits has value 4, expected 8 or 16"),
    ],
)
def test_a_wrong_codec_is_one_line(tiny_demo, capsys, codec, expected):
    arguments, _ = tiny_demo
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--codec", codec])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["--model", "--calibration", "--evaluation"])
def test_missing_data_names_make_data(tiny_demo, name, tmp_path, capsys):
    arguments, _ = tiny_demo
    gone = tmp_path / "gone"
    assert main([*arguments, name, str(gone)]) == 2
    error = capsys.readouterr().err
    assert error == f"mla: error: {gone} does not exist; run make data, or name another one\n"


def test_demo_leaves_a_folder_of_somebody_else_alone(tiny_demo, tmp_path, capsys):
    arguments, _ = tiny_demo
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "mla: error: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_demo_of_the_real_model_reduced(data_paths, tmp_path, capsys):
    sizes = SMALL_SIZES | {"--tokens": 512, "--windows": 1, "--window": 256, "--contexts": [64]}
    paths = (data_paths.model, data_paths.calibration_text, data_paths.evaluation_text)
    assert main(demo_arguments(*paths, tmp_path, sizes)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"] == "SmolLM2-135M-Instruct Q4_1"
    assert report["bytes_per_token"]["original"]["bits16"] == 30 * 768
    assert report["bytes_per_token"]["converted"]["bits16"] <= 0.75 * 30 * 768
    assert 0.97 < report["perplexity"]["ratio"] < 1.15
    assert report["continuation"]["original"].startswith(" Paris")
    assert report["continuation"]["converted"].startswith(" Paris")


# --- costs -------------------------------------------------------------------------------------


class Host:
    """Sizes of SmolLM2-135M as transformers names them."""

    hidden_size, num_attention_heads, num_key_value_heads, head_dim = 576, 9, 3, 64


def converted_layer(C: int, R: int) -> MLAConfig:
    return MLAConfig(
        hidden_size=576,
        num_attention_heads=9,
        kv_lora_rank=C,
        qk_nope_head_dim=64,
        qk_rope_head_dim=R,
        v_head_dim=64,
        rope=RopeConfig(pairing="half"),
        latent_norm="none",
    )


def test_arithmetic_of_absorbed_and_grouped_decoding():
    found = arithmetic(Host, [converted_layer(192, 96)] * 30, [1024])
    assert found["per_cached_token"] == {"original": 9 * 2 * 64, "converted": 9 * (2 * 192 + 96)}
    assert found["per_step"]["1024"]["original"] == 576 * 64 * (9 + 3 + 3 + 9) + 1024 * 9 * 2 * 64
    assert found["crossover_tokens"] is None
    assert found["break_even_per_byte"] == 9 * (2 * 192 + 96) / 768
    text = crossover_text(found)
    assert "there is no crossover: at every context it computes more" in text
    assert "more than 5.6 multiply-adds" in text


def test_crossover_is_where_both_cost_the_same():
    found = arithmetic(Host, [converted_layer(40, 8)], [10])
    tokens = found["crossover_tokens"]
    fixed, per_key = found["fixed"], found["per_cached_token"]
    assert per_key["converted"] < per_key["original"] and fixed["converted"] < fixed["original"]
    assert tokens is None and "computes less" in crossover_text(found)
    found = arithmetic(Host, [converted_layer(64, 8)], [10])
    fixed, per_key = found["fixed"], found["per_cached_token"]
    tokens = found["crossover_tokens"]
    assert "it computes less up to 896 cached tokens" in crossover_text(found)
    at = [fixed[name] + tokens * per_key[name] for name in ("original", "converted")]
    assert math.isclose(*at, rel_tol=1e-12) and tokens > 0


def test_bytes_follow_the_dtype():
    sizes = cached_bytes(Host, [converted_layer(192, 96)] * 2, torch.float32)
    assert sizes["converted"] == {"bits16": 2 * 288 * 2, "stored": 2 * 288 * 4}
    assert sizes["original"] == {"bits16": 2 * 384 * 2, "stored": 2 * 384 * 4}


# --- speed and plot ----------------------------------------------------------------------------


def test_models_are_timed_in_turns_at_the_stated_lengths():
    model = tiny_llama()
    lengths: list[tuple[str, int, int]] = []

    class Spy:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, input_ids, past_key_values, **options):
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            lengths.append((self.name, past, input_ids.shape[1]))
            return model(input_ids=input_ids, past_key_values=past_key_values, **options)

    calls = []
    ids = torch.arange(60) % 40
    found = decode_speeds(
        {"a": Spy("a"), "b": Spy("b")}, ids, [10, 30], steps=2, on_step=lambda: calls.append(1)
    )
    assert len(calls) == num_steps(2, [10, 30], 2)
    assert lengths[:2] == [("a", 0, 10), ("b", 0, 10)]
    single = [(name, past) for name, past, count in lengths if count == 1]
    expected = [(name, past) for past in (10, 11, 12, 30, 31, 32) for name in "ab"]
    assert single == expected
    for context in ("10", "30"):
        assert found[context]["tokens_per_second"]["a"] == 1 / found[context]["seconds"]["a"]


def test_plot_of_a_report_with_missing_spread(tmp_path):
    both = {"original": 2.0, "converted": 3.0}
    report = {
        "model": "m",
        "bytes_per_token": {name: {"bits16": 10} for name in both},
        "perplexity": {
            **both,
            "ratio": 1.5,
            "ratio_standard_error": None,
            "windows": 1,
            "window": 8,
        },
        "decode": {"10": {"tokens_per_second": both}},
        "layers": [{"output_error": 0.1, "score_error": 0.2, "value_error": 0.3}],
    }
    write_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
