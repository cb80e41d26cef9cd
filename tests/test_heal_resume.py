"""Healing of converted models: interruptions, and the command."""

import json

import pytest
from cli_models import llama_folder, text_file, tiny_llama
from heal_models import FAST, WINDOWS, attention_weights, converted_pair, same_bits

from mla.__main__ import main

transformers = pytest.importorskip("transformers")

from mla.integrations.converted import convert_model, load_converted, save_converted  # noqa: E402
from mla.integrations.converted.heal import HealOptions, heal  # noqa: E402
from mla.integrations.converted.heal_loop import rate_at, window_of  # noqa: E402


class Interruption(Exception):
    pass


def interrupting(phase: str, at: int):
    """A progress callback that ends the healing there."""

    def progress(found, done, of, loss):
        if (found, done) == (phase, at):
            raise Interruption

    return progress


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "at"), [("match", 2), ("distil", 4), ("distil", 7)])
def test_a_resumed_healing_has_the_bits_of_an_uninterrupted_one(tmp_path, phase, at):
    options = HealOptions(**FAST, evaluate_every=2, save_every=1 if phase == "match" else 3)
    found = []
    for state in (None, tmp_path / "state"):
        original, conversion = converted_pair()
        if state is not None:
            arguments = {"steps": 9, "options": options, "state": state}
            with pytest.raises(Interruption):
                heal(
                    *(conversion.model, original, WINDOWS),
                    progress=interrupting(phase, at),
                    **arguments,
                )
            original, conversion = converted_pair()  # another process
            calls = []
            report = heal(
                *(conversion.model, original, WINDOWS),
                resume=True,
                progress=lambda *call, calls=calls: calls.append(call[:2]),
                **arguments,
            )
            assert (
                calls[0]
                == {
                    ("match", 2): ("match", 2),
                    ("distil", 4): ("distil", 4),
                    ("distil", 7): ("distil", 7),
                }[phase, at]
            )
        else:
            report = heal(conversion.model, original, WINDOWS, steps=9, options=options)
        found.append((attention_weights(conversion.model), report))
    (expected, whole), (resumed, report) = found
    assert same_bits(resumed, expected)
    clock = {"seconds": 0.0, "processor_seconds": 0.0}
    assert report._replace(**clock) == whole._replace(**clock)


def test_a_finished_healing_is_resumed_at_once(tmp_path):
    original, conversion = converted_pair()
    arguments = {"steps": 3, "options": HealOptions(**FAST), "state": tmp_path / "new" / "state"}
    report = heal(conversion.model, original, WINDOWS, **arguments)
    healed = attention_weights(conversion.model)
    original, conversion = converted_pair()
    again = heal(
        *(conversion.model, original, WINDOWS),
        resume=True,
        progress=interrupting("distil", 1),
        **arguments,
    )
    assert again == report and same_bits(attention_weights(conversion.model), healed)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["state"]


def test_the_state_of_another_healing_is_refused(tmp_path):
    original, conversion = converted_pair()
    state = tmp_path / "state"
    options = HealOptions(**FAST | {"match_steps": 0})
    arguments = {"steps": 8, "options": options, "state": state}
    heal(conversion.model, original, WINDOWS, **arguments)
    _, fresh = converted_pair()
    before = attention_weights(fresh.model)
    for changed, message in (
        ({"steps": 9}, "has steps=8, expected 9 to resume; delete it"),
        ({"options": HealOptions(**FAST, seed=1)}, "match_steps=0, expected 4"),
        ({"windows": WINDOWS.flip(0)}, "state .* has windows='"),
    ):
        call = arguments | {"windows": WINDOWS} | changed
        with pytest.raises(ValueError, match=message):
            heal(fresh.model, original, resume=True, **call)
    with pytest.raises(ValueError, match="has weights='"):  # they are healed already
        heal(conversion.model, original, WINDOWS, resume=True, **arguments)
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"state .* has no readable healing"):
        heal(fresh.model, original, WINDOWS, resume=True, **arguments)
    state.unlink()
    with pytest.raises(ValueError, match=r"state .* does not exist"):
        heal(fresh.model, original, WINDOWS, resume=True, **arguments)
    assert same_bits(attention_weights(fresh.model), before)


def test_every_window_is_read_once_before_any_twice():
    for epoch in range(3):
        assert sorted(window_of(epoch * 7 + i, 7, seed=5) for i in range(7)) == list(range(7))
    orders = {tuple(window_of(epoch * 7 + i, 7, seed=5) for i in range(7)) for epoch in range(3)}
    assert len(orders) == 3


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rates = [rate_at(step, step / 40, 4) for step in range(41)]
    assert rates[:5] == sorted(rates[:5]) and rates[0] < 0.21
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) < 1.0 and rates[-1] == pytest.approx(0.1)
    assert rate_at(30, 2.0, 0) == pytest.approx(0.1)  # beyond the end


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("heal")
    llama, text = llama_folder(root / "llama"), text_file(root / "words.txt", num_words=1500)
    save_converted(
        convert_model(tiny_llama(), WINDOWS, kv_budget=0.5),
        root / "converted",
        tokenizer=transformers.AutoTokenizer.from_pretrained(llama),
    )
    return {"root": root, "llama": llama, "text": text, "converted": root / "converted"}


def command(folders, out, *more) -> list[str]:
    given = {"--original": "llama", "--calibration": "text"}
    options = [x for name, key in given.items() for x in (name, str(folders[key]))]
    sizes = ["--window", "16", "--steps", "54", "--learning-rate", "0.002"]
    return ["heal", str(folders["converted"]), *options, "--out", str(out), *sizes, *more]


def test_command_heals_interrupts_and_resumes(folders, tmp_path, capsys, monkeypatch):
    out = tmp_path / "healed"
    assert main(command(folders, tmp_path / "whole", "--bfloat16", "--checkpointing")) == 0
    assert main(command(folders, tmp_path / "rushed", "--minutes", "0.0001", "--no-matching")) == 0
    from mla.cli import heal as module

    shown, calls = module._Bars.__call__, []

    def interrupted(self, phase, done, of, loss):
        shown(self, phase, done, of, loss)
        calls.append((phase, done))
        if calls.count(("distil", 52)) == 1 and done == 52:
            raise KeyboardInterrupt

    capsys.readouterr()
    monkeypatch.setattr(module._Bars, "__call__", interrupted)
    assert main(command(folders, out)) == 130
    assert not out.exists() and [x.name for x in tmp_path.glob("*.healing")] == ["healed.healing"]
    assert main(command(folders, out)) == 2
    assert "--resume goes on, --force starts anew" in capsys.readouterr().err
    assert main(command(folders, out, "--resume")) == 0
    assert calls[-4:] == [("distil", step) for step in (51, 52, 53, 54)]
    assert calls.count(("distil", 50)) == 1  # the last one that was written
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-1]
    assert last.startswith("heal: done, 54 steps in ") and "held-out text" in last
    assert "relative to the original" in printed
    report = json.loads((out / "heal.json").read_text())
    assert report["steps"] == 54 and len(report["losses"]) == 54
    assert report["divergence_after"] < report["divergence_before"]
    assert set(report["after"]) >= {"before", "after", "ratio", "ratio_error"}
    assert (out / "heal.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.healing*"))
    rushed = json.loads((tmp_path / "rushed" / "heal.json").read_text())
    assert (rushed["stopped"], rushed["steps"], rushed["layers"]) == ("time", 0, [])
    whole, resumed = (load_converted(x).model for x in (tmp_path / "rushed", out))
    assert not same_bits(attention_weights(whole), attention_weights(resumed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"converted": "llama"}, "holds no converted model"),
        ({"llama": "converted"}, "is converted itself, expected the original"),
        ({"llama": "text"}, "is a file, expected the folder of a model"),
        ({"text": "llama"}, "is a folder, expected a file with text"),
    ],
)
def test_command_refuses_in_one_line(folders, tmp_path, capsys, change, message):
    wrong = folders | {name: folders[other] for name, other in change.items()}
    assert main(command(wrong, tmp_path / "out")) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0], error
    assert not list(tmp_path.iterdir())


def test_command_wants_enough_text_and_an_empty_folder(folders, tmp_path, capsys):
    assert main([*command(folders, tmp_path / "out"), "--window", "400"]) == 2
    assert "has 1500 tokens, expected at least 2000: 4 windows" in capsys.readouterr().err
    assert main(command(folders, folders["converted"])) == 2
    assert "is not empty; --force replaces" in capsys.readouterr().err
