import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "train_tiny.py"


def load(name):
    """The example as a module, with its folder on the path as it is when it runs."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


tiny_model = load("tiny_model")
train_tiny = load("train_tiny")


@pytest.fixture
def text(tmp_path):
    """A few kilobytes that a model can learn."""
    words = ["the", "latent", "is", "small", "and", "keys", "were", "not", "so", "small"]
    sentences = (" ".join(words[i % 7 :: 1 + i % 3]) + ".\n" for i in range(160))
    path = tmp_path / "text.txt"
    path.write_text("".join(sentences))
    return path


@pytest.fixture
def models():
    torch.manual_seed(0)
    sizes = train_tiny.QUICK_SIZES
    return [tiny_model.TinyModel(replace(c, **sizes)).eval() for c in train_tiny.MODELS]


def test_script_trains_measures_and_saves(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--quick", "--text", str(text), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (out / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    models = json.loads((out / "report.json").read_text())["models"]
    assert [model["attention"] for model in models] == ["mha", "gqa", "mla"]
    for model in models:
        assert model["train_losses"][0] == pytest.approx(math.log(256), abs=0.3)
        assert model["train_losses"][-1] < model["train_losses"][0] - 1.5
        assert model["validation_losses"][-1][0] == 30
        assert all(speed > 0 for speed in model["tokens_per_second"].values())
        assert model["attention"].upper() in done.stdout
    # 2 layers of float32: 2 * 4 heads of 12, 2 * 2 heads of 12, and 16 + 8 numbers
    assert [model["cache_bytes_per_token"] for model in models] == [768, 384, 192]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "--text has no file nowhere.txt; run `make data`"),
        (["--text", "short.txt", "--quick"], "--text has 5 bytes in short.txt, expected more than"),
        (["--steps", "0"], "--steps has value 0, expected at least 1"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    assert train_tiny.main([*arguments, "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train_tiny: failed: {message}") and error.count("\n") == 1
    assert not Path("out").exists()


def test_cached_decoding_gives_the_logits_of_the_whole_sequence(models):
    tokens = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(0))
    for model in models:
        with torch.no_grad():
            whole = model(tokens)
            cache = model.new_cache(2, 11)
            steps = [model(tokens[:, :5], cache)]
            steps += [model(tokens[:, at : at + 1], cache) for at in range(5, 11)]
        # Float32 through the whole model, chunked and whole: sums in another order.
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_models_have_the_same_size_and_see_no_later_byte(models):
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert max(sizes) <= 1.01 * min(sizes)
    tokens = torch.zeros(1, 9, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 6] = 7
    for model in models:
        with torch.no_grad():
            difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert (difference[:6] == 0).all() and (difference[6:] > 0).all()


def test_batches_and_held_out_text_do_not_depend_on_the_model(text):
    settings = replace(train_tiny.QUICK, batch_size=3, context=10)
    train_text, held_out = train_tiny.read_text(text, settings.context)
    whole = text.read_bytes()
    assert bytes(torch.cat([train_text, held_out]).tolist()) == whole
    assert len(held_out) == len(whole) // 10
    inputs, targets = train_tiny.batch(train_text, settings, torch.Generator().manual_seed(1))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in whole


def test_generation_is_repeatable_and_keeps_the_prompt(models):
    prompt = torch.tensor([72, 105])
    for model in models:
        first, second = (tiny_model.generate(model, prompt, 6, seed=3) for _ in range(2))
        assert torch.equal(first, second) and len(first) == 8
        assert torch.equal(first[:2], prompt)


def test_readable_text_has_no_control_characters():
    letters = torch.tensor([65, 10, 27, 255, 66])
    assert train_tiny.readable(letters) == "A  \N{REPLACEMENT CHARACTER}B"
