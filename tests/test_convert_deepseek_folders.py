"""Folders of stock DeepSeek-V3 models: what is in them, what is replaced, what is refused."""

import json
import math

import pytest
import torch
from hf_models import tokens

from mla.checks import ShapeError, UnsupportedError
from mla.config import MLAConfig, RopeConfig
from mla.convert.deepseek import (
    common_config,
    layout_candidates,
    longrope_parameters,
)

transformers = pytest.importorskip("transformers")

from test_convert_deepseek import converted  # noqa: E402
from test_convert_model import grouped_model  # noqa: E402

from mla.integrations.converted import (  # noqa: E402
    check_export,
    convert_model,
    convert_to_deepseek_v3,
    export_deepseek_v3,
    load_converted,
    save_converted,
    to_deepseek_v3,
)


class Tokenizer:
    """Writes a file, or fails where a disk would."""

    def __init__(self, *, is_broken=False):
        self.is_broken = is_broken

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        if self.is_broken:
            raise OSError("disk full")


def test_what_the_folder_holds(tmp_path):
    conversion = converted("mistral", kv_budget=0.75)
    export_deepseek_v3(conversion, tmp_path / "a" / "v3", tokenizer=Tokenizer())
    files = {file.name: file for file in (tmp_path / "a" / "v3").iterdir()}
    weights = ["model.safetensors", "tokenizer.json"]
    assert sorted(files) == ["config.json", "conversion.json", "generation_config.json", *weights]
    assert files["model.safetensors"].stat().st_mode & 0o777 == 0o644
    values = json.loads(files["config.json"].read_text())
    assert values["architectures"] == ["DeepseekV3ForCausalLM"] and "auto_map" not in values
    host = conversion.model.config
    for name in ("vocab_size", "rms_norm_eps", "eos_token_id", "max_position_embeddings"):
        assert values[name] == getattr(host, name)
    reports = json.loads(files["conversion.json"].read_text())["reports"]
    assert [report["rope_dim"] for report in reports] == [values["qk_rope_head_dim"]] * 2
    assert [x.name for x in (tmp_path / "a").iterdir()] == ["v3"]


def test_a_loaded_conversion_is_exported_as_well(tmp_path):
    conversion = converted("qwen2")
    save_converted(conversion, tmp_path / "own")
    loaded = load_converted(tmp_path / "own")
    export_deepseek_v3(loaded, tmp_path / "v3")
    check = check_export(conversion, tmp_path / "v3", tokens(2, 9, seed=2))
    assert 0 < check.logit_difference < 1e-5 * check.largest_logit
    assert check.exported_loss == pytest.approx(check.loss, rel=1e-5)


@torch.no_grad()
def test_a_check_does_not_hide_what_is_no_number(tmp_path):
    conversion = converted()
    export_deepseek_v3(conversion, tmp_path / "v3")
    conversion.model.model.norm.weight[0] = torch.nan
    assert math.isnan(check_export(conversion, tmp_path / "v3", tokens(2, 5)).logit_difference)


def test_nothing_is_left_of_a_failed_export(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        export_deepseek_v3(converted(), tmp_path / "v3", tokenizer=Tokenizer(is_broken=True))
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_an_exported_model_only(tmp_path):
    conversion = converted()
    export_deepseek_v3(conversion, tmp_path / "v3")
    with pytest.raises(ValueError, match="v3 has something in it already, expected an empty"):
        export_deepseek_v3(conversion, tmp_path / "v3")
    export_deepseek_v3(conversion, tmp_path / "v3", tokenizer=Tokenizer(), overwrite=True)
    assert (tmp_path / "v3" / "tokenizer.json").exists()
    save_converted(conversion, tmp_path / "own")
    with pytest.raises(ValueError, match="own has something else than"):
        export_deepseek_v3(conversion, tmp_path / "own", overwrite=True)
    (tmp_path / "v3" / "conversion.json").write_text("[]")
    steps = []
    with pytest.raises(ValueError, match="v3 has something else than"):
        convert_to_deepseek_v3(
            grouped_model(),
            tokens(1, 8),
            tmp_path / "v3",
            overwrite=True,
            calibrate_progress=lambda *step: steps.append(step),
        )
    assert not steps  # refused before the work


def test_progress_is_reported(tmp_path):
    seen = {"calibrate": [], "layout": [], "convert": []}
    convert_to_deepseek_v3(
        grouped_model(),
        tokens(2, 16, seed=1),
        tmp_path / "v3",
        **{f"{name}_progress": lambda *step, to=to: to.append(step) for name, to in seen.items()},
    )
    assert seen["calibrate"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen["convert"] == [(1, 2), (2, 2)]
    counts, most = zip(*seen["layout"], strict=True)
    assert counts == tuple(range(1, len(counts) + 1)) and len(set(most)) == 1
    assert counts[-1] <= most[0] == 2 * len(layout_candidates(0.75, 2, 8))


@pytest.mark.parametrize(
    ("kv_budget", "sizes"),
    [
        (1.0, [(16, 16)]),
        ((4, 3), [(4, 2)]),
        (0.25, [(2, 5), (4, 3), (6, 1)]),
    ],
)
def test_the_constant_counts(kv_budget, sizes):
    assert layout_candidates(kv_budget, 2, 8) == sizes


@pytest.mark.parametrize("kv_budget", [(0, 4), (2, 1), 0.1])
def test_budgets_without_room_are_refused(kv_budget):
    with pytest.raises(ValueError, match="expected room for a rotated pair"):
        converted(kv_budget=kv_budget)


def test_layers_that_differ_are_refused(tmp_path):
    model = grouped_model(num_hidden_layers=3)
    free = convert_model(model, tokens(2, 24, seed=1), kv_budget=0.5)
    with pytest.raises(UnsupportedError, match="another config in each layer, expected one list"):
        export_deepseek_v3(free, tmp_path / "v3")
    unrotated = convert_model(model, tokens(2, 24, seed=1), kv_budget=(0, 9))
    with pytest.raises(UnsupportedError, match="rope 'none', expected 'half' with given"):
        export_deepseek_v3(unrotated, tmp_path / "v3")
    with pytest.raises(UnsupportedError, match="model has unconverted attention"):
        to_deepseek_v3(model)
    assert not list(tmp_path.iterdir())


def test_other_layers_are_refused():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "kv_lora_rank": 4, "v_head_dim": 4}
    sizes |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2}
    config = MLAConfig(rope=RopeConfig(pairing="half", inv_freq=(1.0,)), **sizes)
    with pytest.raises(UnsupportedError, match="latent_norm 'rms', expected 'none'"):
        common_config([config])
    with pytest.raises(UnsupportedError, match="inv_freq has smallest value 0"):
        longrope_parameters([1.0, 0.0], 10000.0, 64)


def test_biased_mlps_are_refused(tmp_path):
    model = grouped_model(mlp_bias=True)
    with pytest.raises(UnsupportedError, match="mlp_bias True, expected False"):
        convert_to_deepseek_v3(model, tokens(1, 8), tmp_path / "v3")


def test_windows_without_a_next_token_are_refused_before_the_work(tmp_path):
    with pytest.raises(ShapeError, match=r"windows has shape \(3, 1\), expected .* T >= 2"):
        convert_to_deepseek_v3(grouped_model(), tokens(3, 1), tmp_path / "v3")
    assert not list(tmp_path.iterdir())
