"""`python -m mla bench`: the same options as `benchmarks.run`, and one line without a checkout."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import run as benchmarks_run
from benchmarks import sweep
from mla.__main__ import build_parser, main
from mla.cli import bench

ROOT = Path(__file__).resolve().parent.parent


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {text for action in parser._actions for text in action.option_strings}


def test_its_options_are_those_of_the_benchmarks():
    ours = argparse.ArgumentParser()
    bench.add_arguments(ours)
    assert options_of(ours) - {"--list", "--compare"} == options_of(sweep.parser(None))


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "bench " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "--compare BASE" in capsys.readouterr().out


def test_arguments_are_handed_over_as_they_were_typed():
    typed = ["layer", "--quick", "--only", "S=8", "decode", "--dtype", "bf16", "--rounds", "3"]
    typed += ["--price-per-hour", "2.5"]
    parsed = build_parser().parse_args(["bench", *typed])
    assert bench._arguments(parsed) == typed
    expected = sweep.parser(None)
    expected.add_argument("names", nargs="*")
    again = expected.parse_args(bench._arguments(parsed))
    assert (again.quick, again.only, again.dtype) == (True, ["S=8", "decode"], ["bf16"])
    assert (again.threads, again.rounds, again.fresh) == (2, 3, False)
    parsed = build_parser().parse_args(["bench", "layer", "--compare", "main~1", "--threads", "1"])
    assert bench._arguments(parsed) == ["main~1", "layer", "--threads", "1"]


def test_it_measures_and_ends_with_one_line(tmp_path, capsys):
    arguments = ["bench", "capacity", "--only", "deepseek-v3", "--threads", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "capacity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"deepseek-v3"} and len(rows) == 5
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"bench: passed, 5 points measured; rows in {tmp_path}"


def test_list_names_every_benchmark(capsys):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(benchmarks_run.all_benchmarks())


def test_what_it_cannot_do_is_one_line(capsys):
    assert main(["bench", "nothing"]) == 2
    assert capsys.readouterr().err == "bench: failed: no benchmark nothing\n"
    assert main(["bench", "capacity", "--dtype", "bf16", "--threads", "1"]) == 2
    assert capsys.readouterr().err == "bench: failed: no point has bfloat16\n"


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path):
    """A package without its checkout beside it."""
    (tmp_path / "site").mkdir()
    code = "import sys, mla.cli.bench as b; b.ROOT = b.Path(sys.argv[1])\n"
    code += "import mla.__main__ as m; sys.exit(m.main(['bench', '--quick']))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path / "site",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "mla: error: bench: the installed package has no benchmarks; run it in a checkout of the "
        "project, after `make env`\n"
    )
