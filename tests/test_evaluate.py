"""`python -m mla evaluate`: perplexities, intervals, comparisons, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cli_models import llama_folder, text_file

from mla.__main__ import main
from mla.cli.evaluate import STUDENT_95, _interval

WINDOWS = ["--windows", "3", "--window", "32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny Llama, the same converted at 75 %, and two texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    llama = llama_folder(folder / "llama")
    calibration = text_file(folder / "calibration.txt", seed=1)
    text = text_file(folder / "text.txt", seed=2)
    converted = folder / "converted"
    arguments = ["convert", str(llama), "--out", str(converted), "--tokens", "512"]
    assert main([*arguments, "--calibration", str(calibration)]) == 0
    return llama, converted, text


def test_two_models_on_the_same_tokens(files, tmp_path, capsys):
    llama, converted, text = files
    out = tmp_path / "figures.json"
    arguments = ["evaluate", str(converted), "--text", str(text), *WINDOWS]
    assert main([*arguments, "--against", str(llama), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    found = [report["models"][str(folder)] for folder in (converted, llama)]
    assert all(low < middle < high for low, middle, high in [*found, report["ratio"]])
    assert report["ratio"][1] == pytest.approx(found[0][1] / found[1][1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("evaluate: done, 3 windows of 32 tokens; ratio ")
    assert f"perplexity {found[1][1]:.2f}" in lines[-2]


def test_perplexity_is_that_of_the_model(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama, _, text = files
    out = tmp_path / "figures.json"
    arguments = ["evaluate", str(llama), "--text", str(text), "--windows", "1", "--window", "20"]
    assert main([*arguments, "--json", str(out)]) == 0
    ids = AutoTokenizer.from_pretrained(llama)(text.read_text())["input_ids"][:20]
    ids = torch.tensor([ids])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(llama)(input_ids=ids, labels=ids).loss
    expected = pytest.approx(math.exp(loss), rel=1e-5)
    assert json.loads(out.read_text())["models"][str(llama)] == [expected] * 3


def test_coded_rows_cost_something(files, tmp_path):
    _, converted, text = files
    found = []
    for codec in ([], ["--codec", "int4"]):
        out = tmp_path / "figures.json"
        arguments = ["evaluate", str(converted), "--text", str(text), *WINDOWS, *codec]
        assert main([*arguments, "--json", str(out)]) == 0
        found.append(json.loads(out.read_text())["models"][str(converted)][1])
    assert found[0] != found[1] == pytest.approx(found[0], rel=0.2)


@pytest.mark.parametrize("count", [2, 5, 31, 40])
def test_interval_is_students(count):
    generator = torch.Generator().manual_seed(count)
    losses = torch.randn(count, 7, generator=generator, dtype=torch.float64)
    means = losses.mean(1)
    low, middle, high = (math.log(value) for value in _interval(losses))
    factor = STUDENT_95[count - 2] if count <= 31 else 1.96
    assert middle == pytest.approx(float(means.mean()))
    assert high - middle == pytest.approx(middle - low)
    assert high - middle == pytest.approx(factor * float(means.std()) / count**0.5)


def test_refusals_are_one_line(files, tmp_path, capsys):
    llama, _, text = files
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    for arguments, message in (
        ([str(llama), "--text", str(short), *WINDOWS], "text has 2 tokens, expected at least 96"),
        ([str(llama), "--text", str(tmp_path / "no"), *WINDOWS], "does not exist"),
        ([str(llama), "--text", str(text), "--codec", "int8"], "--codec needs a converted model"),
        ([str(tmp_path), "--text", str(text)], "has no config.json"),
    ):
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
