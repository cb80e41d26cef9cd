"""benchmarks.compare: a slowed kernel is flagged, the same code is not, noise is called noise."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import compare, compare_tree
from benchmarks.compare import Ratio, ratio_of
from benchmarks.compare_pair import Measured, Pair, WorkerError
from benchmarks.compare_tree import TreeError, export, resolve, same_sources
from benchmarks.sweep import Benchmark, Options

ROOT = Path(__file__).resolve().parent.parent

PACKAGE = """
import time
import torch

__version__ = "0"


def busy(seconds):
    # Work of a fixed amount of processor time, so that load does not decide the test.
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def kernel():
    busy(0.002)
    return torch.ones(3)


def other():
    busy(0.002)
    return torch.ones(3)
"""
SLOWED = PACKAGE.replace("busy(0.002)", "busy(0.006)", 1)
BENCHMARK = """
import mla
import torch
from benchmarks.harness import Candidate
from benchmarks.sweep import Benchmark, Comparison

RUNS = {"plain": lambda: torch.ones(3), "kernel": mla.kernel, "other": mla.other}
COMPARISON = Comparison(impls=tuple(RUNS), setup=lambda point, impl: Candidate(run=RUNS[impl]))
BENCHMARK = Benchmark(
    name="fake", title="Fake", points=lambda quick: [{"S": 1}], rows_at=COMPARISON.rows_at
)
"""


def git(tree, *arguments) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0")
    subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of a tiny package with today's harness; its only version is tagged ``old``."""
    found = tmp_path / "tree"
    (found / "mla").mkdir(parents=True)
    (found / "mla" / "__init__.py").write_text(PACKAGE)
    (found / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").glob("[!bg]*.py"):
        shutil.copy(path, found / "benchmarks")
    (found / "benchmarks" / "bench_fake.py").write_text(BENCHMARK)
    git(found, "init", "-q")
    git(found, "add", "-A")
    git(found, "commit", "-q", "-m", "old")
    git(found, "tag", "old")
    fake = Benchmark(name="fake", title="", points=lambda quick: [], rows_at=lambda *x: [])
    monkeypatch.setattr(compare, "cases", lambda *x: [compare.Case(fake, {"S": 1})])
    return found


def test_a_slowed_kernel_is_flagged_and_the_same_code_is_not(tree, capsys):
    (tree / "mla" / "__init__.py").write_text(SLOWED)
    out = tree / "out"
    options = ("--threads", "1", "--rounds", "9", "--out", str(out))
    status = compare.main(["old", "--quick", "fake", *options], root=tree)  # as make does
    said = capsys.readouterr().out
    assert status == 1, said
    with (out / "compare.csv").open(newline="") as file:
        rows = {row["impl"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"kernel", "other"}  # `plain` runs no code of the package
    assert rows["kernel"]["verdict"] == "slower" and float(rows["kernel"]["second_ratio"]) > 2
    assert rows["other"]["verdict"] in ("same", "unclear"), said
    assert said.strip().splitlines()[-1].startswith("bench-compare: failed, 1 of 2 slower than old")


def test_what_cannot_be_compared_is_one_line(tree, monkeypatch, capsys):
    assert compare.main(["gone", "--threads", "1"], root=tree) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench-compare: failed: 'gone' is no version that git knows")
    assert said.count("\n") == 1
    monkeypatch.setattr(compare, "cases", lambda *x: [])
    assert compare.main(["old", "fake", "--only", "S=2", "--threads", "1"], root=tree) == 2
    assert capsys.readouterr().err == "bench-compare: failed: no timed case has fake S=2\n"


def test_cases_are_those_that_time_candidates():
    assert compare.cases(["import", "capacity"], Options()) == []
    found = compare.cases(["cache"], Options(quick=True, only=("S=1024",)))
    assert [(case.benchmark.name, case.point["S"]) for case in found] == [("cache", 1024)] * 2


# --- the rule ----------------------------------------------------------------------------------


def rounds_of(*ratios):
    return [(2.0, 2.0 * ratio) for ratio in ratios]


def test_interval_is_that_of_a_sign_test():
    """15 rounds: P(X <= 2) = 0.0037, P(X <= 3) = 0.0176 for X of binomial(15, 1/2)."""
    values = [1.0 + 0.01 * i for i in range(15)]
    assert ratio_of(rounds_of(*values[::-1])) == pytest.approx((1.07, 1.02, 1.12))
    assert ratio_of(rounds_of(*values[:8])) == pytest.approx((1.035, 1.0, 1.07))
    assert ratio_of(rounds_of(*values[:7]))[1:] == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, "slower"),
        (0.7, 0.95, "faster"),
        (0.97, 1.04, "same"),
        (0.9, 1.2, "unclear"),
        (1.04, 1.2, "unclear"),
        (0.0, float("inf"), "unclear"),
    ],
)
def test_verdicts(low, high, verdict):
    assert Ratio(1.0, low, high).verdict == verdict


def test_a_few_rounds_beside_load_decide_nothing():
    quiet, loaded = [1.0] * 13, [9.0, 12.0]
    assert ratio_of(rounds_of(*quiet, *loaded)).verdict == "same"
    assert ratio_of(rounds_of(*[1.5] * 13, 0.1, 0.1)).verdict == "slower"


def test_slower_must_be_seen_twice():
    first = {"impl": "a", "verdict": "slower", "ratio": 2.0}
    assert compare._confirmed(first, [{**first, "ratio": 1.9}])["verdict"] == "slower"
    again = compare._confirmed(first, [{**first, "ratio": 1.0, "verdict": "same"}])
    assert again["verdict"] == "unclear" and again["second_ratio"] == 1.0
    kept = {"impl": "b", "verdict": "same"}
    assert compare._confirmed(kept, []) == kept


class FakePair:
    """In the place of two processes."""

    def __init__(self, measured):
        self.measured = measured

    def measure(self, name, point, on_round):
        return self.measured


@pytest.mark.parametrize(
    ("base", "here", "verdict"),
    [
        (None, "ShapeError: x", compare.FAILS),
        ("AttributeError: y", None, "not in BASE"),
        ("a", "b", "fails in both"),
    ],
)
def test_a_version_that_cannot_run_a_case_is_named(base, here, verdict, tmp_path, capsys):
    benchmark = Benchmark(name="x", title="", points=lambda quick: [], rows_at=lambda *x: [])
    pair = FakePair(Measured({}, error_base=base, error_here=here))
    (row,) = compare._rows(pair, compare.Case(benchmark, {"S": 1}))
    assert row["verdict"] == verdict and row["case"] == "x S=1"
    status = compare.report([row], "old", Options(out=tmp_path), compare.terminal())
    assert status == (1 if verdict == compare.FAILS else 0)
    assert f"x S=1: {verdict}: {here or base}" in capsys.readouterr().out


# --- the tree of the older version -------------------------------------------------------------


def repository(folder, *, kernels=True, built=True):
    (folder / "mla").mkdir(parents=True)
    (folder / "benchmarks").mkdir()
    (folder / "mla" / "__init__.py").write_text("old = True\n")
    (folder / "benchmarks" / "bench_a.py").write_text("old = True\n")
    (folder / "setup.py").write_text("raise SystemExit('setup: this compiler is broken')\n")
    (folder / ".gitignore").write_text("mla/_C.*\n.cache/\n")
    if kernels:
        (folder / "csrc").mkdir()
        (folder / "csrc" / "a.cpp").write_text("int a;\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "old")
    (folder / "mla" / "__init__.py").write_text("old = False\n")
    (folder / "benchmarks" / "bench_a.py").write_text("old = False\n")
    if built:
        (folder / "mla" / "_C.abi3.so").write_text("built")
    (folder / ".cache").mkdir()
    return folder


def test_package_is_old_benchmarks_and_data_are_ours(tmp_path):
    root, base = repository(tmp_path / "root"), tmp_path / "base"
    assert export("HEAD", root, base) == "the same C++ kernels"
    assert (base / "mla" / "__init__.py").read_text() == "old = True\n"
    assert (base / "benchmarks" / "bench_a.py").read_text() == "old = False\n"
    assert (base / "mla" / "_C.abi3.so").read_text() == "built"
    assert (base / ".cache").resolve() == root / ".cache"
    assert len(resolve("HEAD", root)) == 40
    assert not list(tmp_path.glob("*.zip"))


def test_kernels_are_built_where_their_sources_differ(tmp_path, monkeypatch):
    root, base = repository(tmp_path / "root"), tmp_path / "base"
    (root / "csrc" / "a.cpp").write_text("int b;\n")
    with pytest.raises(TreeError, match="cannot be built: setup: this compiler is broken"):
        export("HEAD", root, base)
    assert not same_sources(root, base)
    real, commands = subprocess.run, []

    def run(command, **options):
        if command[0] == "git":
            return real(command, **options)
        commands.append(command[1:])
        (options["cwd"] / "mla" / "_C.so").write_text("its own")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compare_tree.subprocess, "run", run)
    assert "its own C++ kernels" in export("HEAD", root, tmp_path / "again")
    assert commands == [["setup.py", "build_ext", "--inplace"]]


def test_without_kernels_on_one_side_neither_has_them(tmp_path):
    unbuilt = repository(tmp_path / "unbuilt", built=False)
    assert export("HEAD", unbuilt, tmp_path / "a").startswith("no C++ kernels: they are not built")
    older = repository(tmp_path / "older", kernels=False)
    assert "that version has none" in export("HEAD", older, tmp_path / "b")
    assert not list((tmp_path / "b" / "mla").glob("_C*"))


def test_a_worker_that_ends_says_its_last_words(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("")
    (tmp_path / "benchmarks" / "compare_worker.py").write_text("raise SystemExit('no luck')\n")
    pair = Pair(tmp_path, tmp_path, Options())
    with pytest.raises(WorkerError, match="ended with status 1: no luck"), pair:
        pass
