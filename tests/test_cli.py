"""`python -m mla`: info, convert and generate, and one line for every kind of bad input."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cli_models import WORDS, llama_folder, save_tokenizer, text_file
from hf_models import tiny_model

import mla
from mla.__main__ import main
from mla.cli import console, info
from mla.cli.console import one_line, table

ROOT = Path(__file__).resolve().parent.parent
PROMPT = " ".join(WORDS[3:9])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def converted(llama, text, tmp_path_factory):
    """A folder that `convert` wrote."""
    out = tmp_path_factory.mktemp("out") / "converted"
    assert main(convert_arguments(llama, text, out)) == 0
    return out


def convert_arguments(model, text, out, *more) -> list[str]:
    given = {"--calibration": text, "--out": out, "--tokens": 512, "--kv-budget": 0.75}
    options = [str(part) for pair in given.items() for part in pair]
    return ["convert", str(model), *options, *more]


def error_line(capsys) -> str:
    """The one line on stderr of a command that refused its input."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mla: error: "), captured.err
    assert "Traceback" not in captured.out + captured.err
    return lines[0]


def generated(capsys, folder, *more) -> str:
    arguments = ["generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8"]
    assert main([*arguments, *more]) == 0
    return capsys.readouterr().out


# --- info --------------------------------------------------------------------------------------


def test_info_shows_versions_table_and_presets(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (
        mla.__version__,
        torch.__version__,
        "mla_decode",
        "deepseek-v3",
        "batch-invariant",
    ):
        assert part in out


def test_info_as_json_agrees_with_the_support_table(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    decode = [c for c in facts["choices"] if c["op"] == "mla_decode" and c["device"] == "cpu"]
    assert {choice["taken"] for choice in decode} <= {row.name for row in mla.ops.select.TABLE}
    v3 = facts["presets"]["deepseek-v3"]
    assert v3["bytes"] == {"plain": 1152, "fp8": 656, "int8": 656, "int4": 400}
    assert v3["bytes_expanded"] == 2 * 128 * (192 + 128)


def test_info_says_why_a_faster_implementation_is_not_taken(monkeypatch, capsys):
    def rows(op, **case):
        return [("fast", "needs a CUDA device, got cpu"), ("torch", None)]

    monkeypatch.setattr(info, "supported_impls", rows)
    assert main(["info"]) == 0
    assert "fast needs a CUDA device, got cpu" in capsys.readouterr().out


def test_info_and_check_need_torch_and_einops_only():
    code = """
import sys
for name in ("rich", "transformers", "matplotlib", "safetensors", "triton"):
    sys.modules[name] = None
from mla.__main__ import main
sys.exit(main(["info"]) or main(["check"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("check: passed")


# --- convert and generate ----------------------------------------------------------------------


def test_convert_writes_a_model_and_a_report(converted, capsys):
    report = json.loads((converted / "report.json").read_text())
    assert report["kv_budget"] == 0.75 and report["calibration_tokens"] == 512
    assert (
        sum(layer["cached_numbers"] for layer in report["layers"]) == report["kept_numbers"] == 96
    )
    shares = [budget["share"] for budget in report["budgets"]]
    errors = [budget["error"] for budget in report["budgets"]]
    assert shares == sorted(shares) and errors == sorted(errors, reverse=True)
    assert (converted / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(converted.parent.glob(".*"))  # the survey is gone
    assert all(0 <= layer["output_error"] < 1 for layer in report["layers"])


def test_convert_prints_a_table_and_a_last_line(llama, text, tmp_path, capsys):
    assert main(convert_arguments(llama, text, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert "output error" in captured.out
    last = captured.out.strip().splitlines()[-1]
    assert last.startswith("convert: done, 2 layers keep 96 of 128 cached numbers a token (75.0%)")


def test_an_interrupted_conversion_goes_on(llama, text, tmp_path, monkeypatch, capsys):
    survey = import_module("mla.integrations.converted.calibrate")
    out, whole, calls = tmp_path / "out", survey.measure_options, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(survey, "measure_options", interrupted)
    assert main(convert_arguments(llama, text, out)) == 130
    assert not out.exists()
    assert main(convert_arguments(llama, text, out)) == 0
    assert len(calls) == 3 and (out / "config.json").is_file()


def test_the_layout_of_deepseek_v3_is_a_stock_model(llama, text, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "stock"
    assert main(convert_arguments(llama, text, out, "--layout", "deepseek_v3")) == 0
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert (out / "report.png").is_file()
    capsys.readouterr()
    assert main(convert_arguments(llama, text, out, "--layout", "deepseek_v3")) == 2
    assert "--force replaces" in error_line(capsys)
    assert main(convert_arguments(llama, text, out, "--layout", "deepseek_v3", "--force")) == 0


@pytest.mark.parametrize("codec", [None, "int4"])
def test_generate_streams_what_the_loaded_model_generates(converted, capsys, codec):
    from transformers import AutoTokenizer

    from mla.integrations.converted import load_converted
    from mla.integrations.transformers import replace_attention

    tokenizer = AutoTokenizer.from_pretrained(converted)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model = load_converted(converted).model
    replace_attention(model, codec=codec and mla.Int4Codec())
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    more = () if codec is None else ("--codec", codec)
    assert generated(capsys, converted, *more).split() == expected.split()


def test_draws_depend_on_the_seed_alone(converted, capsys):
    hot = [generated(capsys, converted, "--temperature", "3", "--seed", s) for s in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]


def test_chat_uses_the_template(converted, capsys):
    assert generated(capsys, converted, "--chat") != generated(capsys, converted)


def test_generate_runs_an_mla_model_of_transformers(tmp_path, capsys):
    from transformers import AutoTokenizer

    model = tiny_model("deepseek_v3", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generated(capsys, tmp_path).split() == expected.split()


def test_force_replaces_a_converted_model_and_nothing_else(llama, text, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert main(convert_arguments(llama, text, out)) == 0
    first = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(convert_arguments(llama, text, out)) == 2
    assert "is not empty; --force replaces a converted model" in error_line(capsys)
    assert main(convert_arguments(llama, text, out, "--force", "--kv-budget", "0.5")) == 0
    assert (out / "model.safetensors").read_bytes() != first
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert main(convert_arguments(llama, text, other, "--force")) == 2
    error_line(capsys)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["check", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "x", "--out", "y"], "required: --calibration"),
        (convert_arguments("x", "t", "y", "--kv-budget", "0"), "has value 0, expected above 0"),
        (convert_arguments("x", "t", "y", "--kv-budget", "1.5"), "at most 1"),
        (convert_arguments("x", "t", "y", "--kv-budget", "nan"), "at most 1"),
        (convert_arguments("x", "t", "y", "--tokens", "1"), "expected at least 2"),
        (["generate", "--model", "x", "--prompt", "p", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "--model", "x", "--prompt", "p", "--temperature", "-1"], "at least 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in error_line(capsys)


def test_missing_model_and_text_are_one_line(llama, text, tmp_path, capsys):
    gone, out = tmp_path / "gone", tmp_path / "out"
    assert main(convert_arguments(gone, text, out)) == 2
    assert f"{gone} does not exist, expected the folder of a model" in error_line(capsys)
    assert main(convert_arguments(text, text, out)) == 2
    assert "is a file, expected the folder of a model" in error_line(capsys)
    assert main(convert_arguments(llama, gone, out)) == 2
    assert f"{gone} does not exist, expected a file with text" in error_line(capsys)
    assert main(["generate", "--model", str(gone), "--prompt", "w1"]) == 2
    assert "does not exist" in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "has no config.json"),
        ("config.json", b"\x00\x01 not json", "is not JSON"),
        ("config.json", b"[1, 2]", "holds no object"),
        ("config.json", b"{}", "cannot be loaded as a model"),
        ("config.json", b'{"model_type": "nonsense"}', "cannot be loaded as a model"),
        ("config.json", b'{"format": "mla-converted"}', "version"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(name, content, message, tmp_path, capsys):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "w1"]) == 2
    assert message in error_line(capsys)


def test_broken_weights_are_one_line(llama, converted, text, tmp_path, capsys):
    for source in (llama, converted):
        folder = tmp_path / source.name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        capsys.readouterr()
        assert main(["generate", "--model", str(folder), "--prompt", "w1"]) == 2
        error_line(capsys)


def test_a_model_without_latent_attention_is_one_line(llama, capsys):
    assert main(["generate", "--model", str(llama), "--prompt", "w1"]) == 2
    line = error_line(capsys)
    assert "without multi-head latent attention" in line and "python -m mla convert" in line


def test_a_model_that_cannot_be_converted_is_one_line(text, tmp_path, capsys):
    tiny_model("deepseek_v3", dtype=torch.float32).save_pretrained(tmp_path / "v3")
    save_tokenizer(tmp_path / "v3")
    capsys.readouterr()
    assert main(convert_arguments(tmp_path / "v3", text, tmp_path / "out")) == 2
    assert "model_type 'deepseek_v3'" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_one_line(llama, tmp_path, capsys):
    short = text_file(tmp_path / "short.txt", num_words=40)
    assert main(convert_arguments(llama, short, tmp_path / "out")) == 2
    assert "40 tokens" in error_line(capsys)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert main(convert_arguments(llama, binary, tmp_path / "out")) == 2
    assert "is not UTF-8 text" in error_line(capsys)


def test_an_empty_prompt_is_one_line(converted, capsys):
    assert main(["generate", "--model", str(converted), "--prompt", ""]) == 2
    assert "--prompt is empty" in error_line(capsys)


def test_a_missing_extra_names_the_line_that_mends_it(llama, monkeypatch, capsys):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "--model", str(llama), "--prompt", "w1"]) == 2
    assert "pip install 'mla[transformers]'" in error_line(capsys)


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_traceback_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        main(["--traceback", "generate", "--model", str(tmp_path), "--prompt", "w1"])


def test_as_a_process_bad_input_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "mla", "generate", "--model", str(tmp_path), "--prompt", "x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("mla: error: ") and result.stderr.count("\n") == 1


# --- helpers -----------------------------------------------------------------------------------


def test_table_aligns_numbers_right_and_words_left():
    lines = table(("name", "bytes"), [("a", 5), ("longer", 1234)]).splitlines()
    assert lines == ["  name    bytes", "  ------  -----", "  a           5", "  longer   1234"]


def test_one_line_never_has_a_line_break():
    assert one_line(ValueError("a\n  b\n")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
