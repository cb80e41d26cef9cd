"""examples/generate_parallel.py: the tokens of one process, or a message and exit status 1."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from context_ranks import run_example
from processes import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("count", "splits"), [(2, [(2, 1), (1, 2)]), (4, [(2, 2)])])
def test_tokens_are_those_of_one_process(count, splits):
    for found in run_ranks(run_example, count, splits, str(EXAMPLES)):
        assert found == [True] * len(splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context-parallel", "2"], "1 processes, expected 2; start it with torchrun"),
        (["--tokens", "0"], "--tokens and --prompt: expected at least one token of each"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert importlib.import_module("generate_parallel").main(arguments) == 1
    out, error = capsys.readouterr()
    assert error.startswith(f"generate_parallel: failed: {message}") and error.count("\n") == 1
    assert out == ""
