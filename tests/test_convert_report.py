"""The conversion report: rows within their bytes, quantised baselines, resuming, table, plot."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from hf_models import tokens
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import UnsupportedError
from mla.codec import Int4Codec, Int8Codec, PlainCodec
from mla.convert import token_losses
from mla.plan import bytes_per_token

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console  # noqa: E402
from test_convert_model import grouped_model  # noqa: E402

from benchmarks import convert_mha, convert_plots, convert_report  # noqa: E402
from benchmarks.convert_lab import Lab  # noqa: E402
from benchmarks.convert_report import Case, RowFile, Settings, cases, measure, run  # noqa: E402
from benchmarks.convert_table import show_tables, within  # noqa: E402
from mla.integrations.converted.quantised_gqa import GroupedCodec, quantised_rows  # noqa: E402

SETTINGS = Settings(windows=2, context=16, tokens=96, mha_minutes=0.0, heal_minutes=0.01)


def make_lab(host: str = "llama", **overrides) -> Lab:
    model = grouped_model(host, **overrides)
    return Lab(model, tokens(6, 24, seed=1), tokens(2, 16, seed=2))


@pytest.fixture(scope="module")
def lab() -> Lab:
    return make_lab()


# --- the plain quantised cache ---------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 4, 8]),
    seed=st.integers(0, 2**31 - 1),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_rounding_is_off_by_half_a_step_at_most(bits, group, seed, size):
    codec = GroupedCodec(bits=bits, group=group)
    rng = torch.Generator().manual_seed(seed)
    rows = size * torch.randn(2, 3, 5, 16, generator=rng, dtype=torch.float64)
    grouped = rows.unflatten(-1, (-1, group or 16))
    error = (codec.through(rows) - rows).abs().unflatten(-1, (-1, group or 16))
    if bits == 8:
        step = grouped.abs().amax(-1, keepdim=True) / 127
    else:
        step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / (2**bits - 1)
    # Half a step, and what scale and low lose in 16 bits, subnormal ones included.
    slack = 2**-10 * (grouped.abs().amax(-1, keepdim=True) + 2**bits * step) + 2**bits * 6e-8
    assert (error <= 0.5 * step + slack).all()
    assert torch.equal(codec.through(torch.zeros(3, 16)), torch.zeros(3, 16))
    assert codec.through(torch.empty(0, 16)).shape == (0, 16)


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31 - 1))
def test_rows_that_lie_on_the_grid_come_back_as_they_were(bits, seed):
    rng = torch.Generator().manual_seed(seed)
    largest = 127 if bits == 8 else 2**bits - 1
    low = -largest if bits == 8 else 0
    grid = torch.randint(low, largest + 1, (4, 16), generator=rng).double()
    grid[:, 0], grid[:, 1] = low, largest
    rows = 0.25 * grid - (1.0 if bits < 8 else 0.0)
    assert torch.equal(GroupedCodec(bits=bits).through(rows), rows)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (GroupedCodec(bits=8), 396),
        (GroupedCodec(bits=4, group=32), 240),
        (GroupedCodec(bits=3, group=32), 192),
        (GroupedCodec(bits=2, group=32), 144),
        (GroupedCodec(bits=4), 216),
    ],
)
def test_bytes_of_quantised_rows(codec, size):
    assert codec.bytes_per_token(3, 64) == size


@pytest.mark.parametrize("host", ["llama", "qwen2", "mistral", "llama-mha"])
def test_quantised_rows_are_what_attention_reads(host, monkeypatch):
    """Keys after RoPE and values pass through the codec, in every layer, and nothing else does."""
    model, windows = grouped_model(host), tokens(2, 12, seed=3)
    plain, seen = token_losses(model, windows), []
    codec = GroupedCodec(bits=8)

    def through(self, rows):
        seen.append(rows)
        return rows

    with monkeypatch.context() as patch, quantised_rows(model, codec):
        patch.setattr(GroupedCodec, "through", through)
        assert torch.equal(token_losses(model, windows), plain)
    assert len(seen) == 2 * 2 * model.config.num_hidden_layers  # two windows, keys and values
    cached = model(input_ids=windows[:1], use_cache=True).past_key_values
    torch.testing.assert_close(seen[0], cached.layers[0].keys)
    torch.testing.assert_close(seen[1], cached.layers[0].values)


def test_quantised_losses_change_and_the_model_stays_as_it_was():
    model, windows = grouped_model(), tokens(2, 12, seed=3)
    plain = token_losses(model, windows)
    changes = []
    for bits in (8, 4, 2):
        with quantised_rows(model, GroupedCodec(bits=bits)):
            changes.append(float((token_losses(model, windows) - plain).abs().mean()))
    assert 0 < changes[0] < changes[1] < changes[2]
    with pytest.raises(RuntimeError, match="inside"), quantised_rows(model, GroupedCodec()):
        raise RuntimeError("inside")
    assert torch.equal(token_losses(model, windows), plain)


def test_quantised_rows_refuse_what_they_would_get_wrong():
    with pytest.raises(UnsupportedError, match="bits has value 9, expected 2 to 8"):
        GroupedCodec(bits=9)
    with pytest.raises(UnsupportedError, match="group has value 0"):
        GroupedCodec(group=0)
    with pytest.raises(UnsupportedError, match=r"group has value 32, expected a divisor of .* 24"):
        GroupedCodec(group=32).bytes_per_token(1, 24)
    model = grouped_model()
    with (
        pytest.raises(UnsupportedError, match="past_key_values has a cache, expected None"),
        quantised_rows(model, GroupedCodec()),
    ):
        model(input_ids=tokens(1, 4), use_cache=True)
    with (
        pytest.raises(UnsupportedError, match="quantised_rows: model has model_type None"),
        quantised_rows(torch.nn.Linear(2, 2), GroupedCodec()),
    ):
        pass


# --- conversions within bytes ----------------------------------------------------------------


@pytest.mark.parametrize("host", ["llama", "qwen2", "mistral"])
def test_the_published_objective_is_exact_at_full_rank(host):
    lab = make_lab(host)
    half = lab.host.num_kv_heads * lab.host.head_dim
    published = lab.published_model((half, half), fold=1)
    ids = tokens(2, 20, seed=4)
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (published, lab.model))
    # transformers computes angles in float32, whatever the dtype of the model.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("codec", [PlainCodec(), Int8Codec(rope_bits=8), Int4Codec(rope_bits=8)])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_rank_is_the_largest_that_fits_the_bytes(lab, codec, share):
    room = share * lab.original_bytes
    try:
        numbers = lab.numbers(share, codec)
    except ValueError:
        least = sum(min(option.size for option in layer) for layer in lab.options)
        assert lab.bytes_of(least, codec) > room
        return
    assert lab.bytes_of(numbers, codec) <= room
    if numbers < lab.full:
        assert lab.bytes_of(min(numbers + lab.size_step, lab.full), codec) > room
    converted = lab.converted(share, codec)
    found = [config.cache_width for config in converted.configs]
    assert sum(found) <= numbers == round(converted.kv_budget * lab.full)
    assert sum(bytes_per_token(config, codec) for config in converted.configs) <= room


@pytest.mark.parametrize("fold", [1, 2])
def test_the_published_objective_gets_the_same_bytes(lab, fold):
    for share in (0.9, 0.6):
        converted = lab.published(share, PlainCodec(), fold)
        sizes = {(c.qk_rope_head_dim, c.kv_lora_rank) for c in converted.configs}
        assert len(sizes) == 1
        ((R, C),) = sizes
        assert lab.host.head_dim == R
        most = share * lab.original_bytes / lab.host.num_layers / 2
        assert most - lab.size_step < R + C <= most


# --- rows ------------------------------------------------------------------------------------

WANTED = [
    Case(convert_report.SMOLLM2, "grouped", None, GroupedCodec(bits=4, group=4)),
    Case(convert_report.SMOLLM2, "ours", 0.25, PlainCodec()),
    Case(convert_report.SMOLLM2, "published", 0.25, PlainCodec(), 2),
    Case(convert_report.TINY, "ours", 0.5, PlainCodec()),
]


@pytest.fixture(scope="module")
def measured(lab, tmp_path_factory):
    """A folder with rows, and what was said."""
    folder, said = tmp_path_factory.mktemp("report"), []
    rows = RowFile(folder, SETTINGS, fresh=False)
    makers = {convert_report.SMOLLM2: lambda: lab, convert_report.TINY: lambda: lab}
    assert run(WANTED, makers, rows, SETTINGS, minutes=0, say=said.append) == []
    return folder, rows, said


def forbidden():
    raise AssertionError("measured again")


def test_a_second_run_measures_only_what_is_missing(measured):
    folder, rows, said = measured
    again, heard = RowFile(folder, SETTINGS, fresh=False), []
    assert again.rows == rows.rows
    makers = dict.fromkeys((convert_report.SMOLLM2, convert_report.TINY), forbidden)
    assert run(WANTED, makers, again, SETTINGS, minutes=0, say=heard.append) == []
    assert said[0].endswith("4 of 4 rows to measure") and len(said) == 5
    assert heard == ["convert-report: 0 of 4 rows to measure"]
    other = Settings(windows=3, context=16, tokens=96, mha_minutes=0.0)
    assert not any(RowFile(folder, other, fresh=False).has(case) for case in WANTED)
    assert not any(RowFile(folder, SETTINGS, fresh=True).has(case) for case in WANTED)


def test_minutes_of_the_tiny_model_matter_to_its_rows_alone(measured):
    other = RowFile(measured[0], Settings(**vars(SETTINGS) | {"mha_minutes": 7.0}), fresh=False)
    assert [other.has(case) for case in WANTED] == [True, True, True, False]


def test_a_row_with_other_settings_is_replaced(measured, tmp_path):
    rows = RowFile(tmp_path, SETTINGS, fresh=False)
    rows.add(WANTED[0], {"ratio": 1.0})
    rows.settings = Settings(**vars(SETTINGS) | {"windows": 3})
    rows.add(WANTED[0], {"ratio": 2.0})
    assert [(row["ratio"], row["windows"]) for row in rows.rows] == [(2.0, 3)]
    assert len((tmp_path / "convert.csv").read_text().splitlines()) == 2


def test_no_row_is_begun_after_the_time_is_over(tmp_path):
    rows = RowFile(tmp_path, SETTINGS, fresh=False)
    makers = dict.fromkeys((convert_report.SMOLLM2, convert_report.TINY), forbidden)
    left = run(WANTED, makers, rows, SETTINGS, minutes=1e-9, say=lambda text: None)
    assert left == WANTED


def test_rows_hold_what_they_claim(measured, lab):
    by_method = {row["method"]: row for row in measured[1].rows[:3]}
    for row in by_method.values():
        assert row["original_bytes"] == lab.original_bytes == 2 * 2 * 2 * 2 * 8
        assert row["ratio"] > 0 and math.isfinite(row["ratio_error"]) and row["commit"]
    for method in ("ours", "published"):
        row = by_method[method]
        assert row["rope_dims"] + row["latent_dims"] <= row["kv_budget"] * lab.full
        assert row["bytes_per_token"] == 2 * (row["rope_dims"] + row["latent_dims"])
        assert row["bytes_per_token"] <= 0.75 * lab.original_bytes


def test_full_rank_is_one_row_however_many_budgets_it_fits(lab):
    codec = Int4Codec(group=16, rope_bits=8)
    full = lab.bytes_of(lab.full, codec) / lab.original_bytes
    fitting = sorted(1 - saved for saved in convert_report.GOAL_CODECS if 1 - saved >= full)
    own = [
        1 - saved
        for saved in convert_report.GOAL_CODECS
        if measure(Case(convert_report.SMOLLM2, "ours", saved, codec), lab, SETTINGS) is not None
    ]
    assert [share for share in own if share in fitting] == fitting[:1]


def test_healing_starts_from_a_conversion_of_its_own(lab):
    held = lab.converted(0.75, PlainCodec())
    before = [x.clone() for x in held.model.parameters()]
    lab.healed(lab.numbers(0.75, PlainCodec()), minutes=0.002)
    assert all(torch.equal(x, y) for x, y in zip(held.model.parameters(), before, strict=True))


def test_cases_are_all_different_and_goals_come_first():
    found = cases(heal=True)
    assert len(found) == len(set(found))
    assert {case.method for case in found} == {"ours", "healed", "published", "grouped"}
    assert not [case for case in cases(heal=False) if case.method == "healed"]
    goals = [
        found.index(Case(convert_report.SMOLLM2, "ours", saved, codec))
        for saved, codec in convert_report.GOAL_CODECS.items()
    ]
    assert max(goals) < 10


# --- table and plot --------------------------------------------------------------------------


def test_tables_show_rows_goals_and_who_wins(measured):
    console = Console(record=True, width=200, file=io.StringIO())
    show_tables(measured[1].rows, console)
    text = console.export_text()
    assert "1.05" in text and "1.03" in text and "F=2" in text
    row = within(measured[1].rows[:3], "ours", 0.25)[0]
    assert f"{row['ratio']:.3f} +-{row['ratio_error']:.3f}" in text
    assert "* the best of all" in text and "times the multiply-adds of the original" in text


def test_plot_needs_the_csv_only(measured, tmp_path):
    paths = convert_plots.draw(measured[0] / "convert.csv", tmp_path)
    assert [path.name for path in paths] == ["convert.png", "convert.svg"]
    first = paths[1].read_bytes()
    assert convert_plots.draw(measured[0] / "convert.csv", tmp_path)[1].read_bytes() == first
    assert convert_plots.main(["--rows", str(tmp_path / "none.csv")]) == 0


# --- the tiny model --------------------------------------------------------------------------


def test_tiny_mha_is_trained_once_and_has_as_many_key_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_mha, "CONTEXT", 16)
    monkeypatch.setitem(convert_mha.SIZES, "num_hidden_layers", 1)
    text = tmp_path / "text.txt"
    text.write_text("a text that repeats itself. " * 30)
    seen: list[tuple[int, int]] = []

    def make(minutes: float):
        return convert_mha.tiny_mha(
            text, tmp_path / "model", minutes=minutes, progress=lambda *at: seen.append(at)
        )

    model = make(0.001)
    assert seen and not model.training
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 8
    assert json.loads((tmp_path / "model/training.json").read_text())["steps"] == len(seen)
    seen.clear()
    make(0.0005)
    assert not seen
    make(0.002)
    assert seen


def test_byte_windows(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250, 256)) + b"abcd")
    found = convert_mha.byte_windows(path, count=2, length=3)
    assert found.tolist() == [[250, 251, 252], [253, 254, 255]]
    assert convert_mha.byte_windows(path, count=9, length=4).shape == (2, 4)
