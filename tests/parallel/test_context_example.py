"""examples/generate_parallel.py: the tokens of one process, or a message and exit status 1."""

from __future__ import annotations

import os
import subprocess
import sys
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
def test_bad_arguments_give_one_line(arguments, message):
    command = [sys.executable, str(EXAMPLES / "generate_parallel.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "WORLD_SIZE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"generate_parallel: failed: {message}")
    assert done.stderr.count("\n") == 1
