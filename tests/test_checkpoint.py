"""Folders of converted models: round trips, all or nothing, and every kind of damage."""

import json
import stat

import pytest
import torch
from hf_models import tokens

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from test_convert_model import continuation, grouped_model, logits

from mla.convert.checkpoint import load_checkpoint
from mla.integrations.converted import (
    convert_model,
    load_converted,
    save_converted,
)


@pytest.fixture(scope="module")
def conversion():
    return convert_model(grouped_model("llama"), tokens(2, 24, seed=1), kv_budget=0.5)


@pytest.fixture
def folder(conversion, tmp_path):
    save_converted(conversion, tmp_path / "model")
    return tmp_path / "model"


def contents(path):
    """Every file below ``path`` with its bytes."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("host", ["llama", "llama-llama3", "qwen2", "mistral"])
@pytest.mark.parametrize("kv_budget", [1.0, 0.5, (0, 9)])
def test_round_trip(host, kv_budget, tmp_path):
    conversion = convert_model(grouped_model(host), tokens(2, 24, seed=1), kv_budget=kv_budget)
    save_converted(conversion, tmp_path / "a" / "model")
    loaded = load_converted(tmp_path / "a" / "model")
    ids = tokens(2, 9, seed=2)
    for name, x in conversion.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], x), name
    expected = logits(conversion.model, ids)
    # Equal weights; products may take another path of the library.
    torch.testing.assert_close(logits(loaded.model, ids), expected, rtol=1e-10, atol=1e-10)
    inputs = {"input_ids": ids}
    assert torch.equal(continuation(loaded.model, inputs), continuation(conversion.model, inputs))
    assert loaded.reports == conversion.reports
    save_converted(loaded, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a" / "model")


def test_tied_embeddings_are_stored_once_and_stay_tied(folder):
    names = load_file(folder / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = load_converted(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_heads_are_stored(tmp_path):
    conversion = convert_model(grouped_model("qwen2"), tokens(2, 24, seed=1))
    save_converted(conversion, tmp_path / "model")
    model = load_converted(tmp_path / "model").model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, conversion.model.lm_head.weight)


def test_dtype_is_kept_or_chosen(folder):
    assert load_converted(folder).model.dtype == torch.float64
    model = load_converted(folder, dtype=torch.bfloat16).model
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_tokenizer_files_come_along(conversion, tmp_path):
    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    save_converted(conversion, tmp_path / "model", tokenizer=Tokenizer())
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_files_are_readable_by_others(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644


def test_a_folder_in_use_is_not_overwritten(conversion, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="has something in it already, expected an empty folder"):
        save_converted(conversion, folder)
    assert contents(folder) == before


def test_overwrite_replaces_a_converted_model_only(conversion, folder, tmp_path):
    (folder / "stale.txt").write_text("old")
    save_converted(conversion, folder, overwrite=True)
    assert not (folder / "stale.txt").exists() and load_checkpoint(folder).layers
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="something else than a converted model"):
        save_converted(conversion, other, overwrite=True)
    file = tmp_path / "file"
    file.write_text("years")
    with pytest.raises(ValueError, match="has something in it already"):
        save_converted(conversion, file, overwrite=True)
    assert contents(other) == {"thesis.txt": b"years"} and file.read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "thesis"]


def test_an_empty_folder_is_used(conversion, tmp_path):
    (tmp_path / "model").mkdir()
    save_converted(conversion, tmp_path / "model")
    assert load_checkpoint(tmp_path / "model").layers


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(conversion, folder, tmp_path, overwrite):
    class Broken:
        def save_pretrained(self, path):
            raise OSError("disk full")

    before = contents(tmp_path)
    target = folder if overwrite else tmp_path / "new"
    with pytest.raises(OSError, match="disk full"):
        save_converted(conversion, target, tokenizer=Broken(), overwrite=overwrite)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def set_config(**changes):
    return lambda folder: edit_config(folder, lambda values: values.update(changes))


def change_layer(name, value):
    return lambda folder: edit_config(
        folder, lambda values: values["layers"][1].update({name: value})
    )


def change_host(name, value):
    return lambda folder: edit_config(folder, lambda values: values["host"].update({name: value}))


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(name, share):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return damage


KEY = "model.layers.0.self_attn.mla.kv_b_proj.weight"
DAMAGES = {
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no-json": (cut("config.json", 0.5), "config.json has no readable JSON"),
    "binary-config": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json has no readable JSON",
    ),
    "a-list": (lambda f: (f / "config.json").write_text("[1]"), "format None"),
    "another-model": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "format None, expected 'mla-converted': it is not a converted model",
    ),
    "newer-version": (set_config(version=2), "version 2, expected 1"),
    "no-layers": (set_config(layers=[]), "has 0 layers and 2 reports"),
    "layers-of-another-kind": (set_config(layers={}), "has no layers, expected a list"),
    "layers-of-numbers": (set_config(layers=[1, 2]), "wrong entry 0 in layers"),
    "no-host": (set_config(host=None), "has no host, expected a dict"),
    "wrong-size": (change_layer("kv_lora_rank", -3), "wrong entry 1 in layers .*kv_lora_rank has"),
    "unknown-field": (change_layer("surprise", 1), "wrong entry 1 in layers .*unknown fields"),
    "other-rank": (change_layer("kv_lora_rank", 5), r"\[5, .|\(14, 48\)|expected \("),
    "wrong-report": (set_config(reports=[{}, {}]), "wrong entry 0 in reports"),
    "fewer-layers": (change_host("num_hidden_layers", 1), "host has 1 layers, expected 2"),
    "other-host": (change_host("model_type", "gpt2"), "host has model_type 'gpt2'"),
    "no-host-type": (change_host("model_type", None), "host has model_type None"),
    "wrong-host": (change_host("hidden_size", 47), "host config is not one of llama"),
    "wider-host": (
        change_host("intermediate_size", 41),
        r"has shape \(40, 48\), expected \(41, 48\)",
    ),
    "missing-tensor": (change_tensors(lambda t: t.pop(KEY)), "missing .*kv_b_proj"),
    "missing-norm": (change_tensors(lambda t: t.pop("model.norm.weight")), "missing .*model.norm"),
    "extra-tensor": (
        change_tensors(lambda t: t.update(x=torch.ones(1))),
        "1 unknown .'x'. tensors",
    ),
    "extra-in-layer": (
        change_tensors(lambda t: t.update({KEY + "s": torch.ones(1)})),
        "unknown .*kv_b_proj.weights",
    ),
    "wrong-shape": (
        change_tensors(lambda t: t.update({KEY: torch.ones(2, 2)})),
        r"\(2, 2\) torch.f",
    ),
    "wrong-dtype": (change_tensors(lambda t: t.update({KEY: t[KEY].long()})), "torch.int64 at"),
    "cut-weights": (cut("model.safetensors", 0.7), "no complete tensors"),
    "cut-header": (cut("model.safetensors", 0.01), "no complete tensors"),
    "empty-weights": (cut("model.safetensors", 0.0), "no complete tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_line(folder, damage):
    apply, message = DAMAGES[damage]
    apply(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_converted(folder)
    assert str(caught.value).startswith("load_c") and "\n" not in str(caught.value)
    assert contents(folder) == before


def test_what_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"model does not exist, expected the folder of a model"):
        load_converted(tmp_path / "model")
    (tmp_path / "model").write_text("no model")
    with pytest.raises(ValueError, match="model is a file, expected the folder of a model"):
        load_converted(tmp_path / "model")
