"""Rows of a benchmark: written as they come, kept by the next run, marked where memory ran out."""

from __future__ import annotations

import csv
import json

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import ceilings, report, resume, run, sweep
from benchmarks.harness import Candidate, is_out_of_memory
from benchmarks.report import terminal

HUGE = 1 << 60  # bytes that no machine has


@pytest.fixture(autouse=True)
def same_source(monkeypatch):
    """Files of the checkout may change while the tests run."""
    monkeypatch.setattr(resume, "source", lambda: "a")


class Trace:
    """A benchmark of two candidates, with what it measured; ``fails`` acts before each point."""

    def __init__(self, fails=lambda point: None, points=(1, 2, 3), columns=lambda row: {}):
        self.measured: list[int] = []

        def rows_at(point, options, on_round):
            fails(point)
            self.measured.append(point["S"])
            rows = comparison.rows_at(point, options, on_round)
            return [{**row, **columns(row)} for row in rows]

        def setup(point, impl):
            if point["S"] == 2 and impl == "greedy":
                torch.empty(HUGE, dtype=torch.uint8)
            size = point["S"]
            return Candidate(run=lambda: torch.arange(4.0) + size)

        comparison = sweep.Comparison(impls=("plain", "greedy"), setup=setup)
        self.benchmark = sweep.Benchmark(
            name="trace",
            title="A trace",
            points=lambda quick: [{"S": S, "dtype": "float32"} for S in points],
            rows_at=rows_at,
        )

    def run(self, out, **options) -> sweep.Count:
        found = sweep.Options(out=out, **{"rounds": 3, **options})
        return sweep.run(self.benchmark, found, terminal())


def rows_in(out):
    """Of the CSV file, which must agree with the JSON file."""
    with (out / "trace.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((out / "trace.json").read_text())
    assert len(rows) == len(document["rows"])
    return [(int(row["S"]), row["impl"], row["status"]) for row in rows]


def interrupt(at):
    def fails(point):
        if point["S"] == at:
            raise KeyboardInterrupt

    return fails


def test_a_run_that_is_cut_off_keeps_its_rows_and_the_next_one_goes_on(tmp_path, capsys):
    first = Trace(fails=interrupt(3), points=(1, 3, 4))
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path)
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1]
    second = Trace(points=(1, 3, 4))
    assert second.run(tmp_path) == (2, 1, 0)
    assert second.measured == [3, 4]
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1, 3, 3, 4, 4]
    shown = capsys.readouterr().out
    assert "trace: 1 of 3 points are there from an earlier run" in shown and "--fresh" in shown


def test_fresh_measures_everything_again_and_forgets_the_rest(tmp_path):
    Trace().run(tmp_path)
    again = Trace(points=(1, 3))
    assert again.run(tmp_path, fresh=True) == (2, 0, 0)
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1, 3, 3]


def test_rows_of_other_code_or_another_machine_are_measured_again(tmp_path, monkeypatch):
    Trace(points=(1, 3)).run(tmp_path)
    here = report.environment()
    monkeypatch.setattr(resume, "environment", lambda: {**here, "commit": "another"})
    assert Trace(points=(1,)).run(tmp_path) == (0, 1, 0)  # the sources are the same
    monkeypatch.setattr(resume, "environment", lambda: {**here, "threads": 64})
    assert Trace(points=(1,)).run(tmp_path) == (1, 0, 0)
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1]  # 3 was of another machine
    monkeypatch.setattr(resume, "environment", lambda: here)
    monkeypatch.setattr(resume, "source", lambda: "b")
    assert Trace(points=(1,)).run(tmp_path) == (1, 0, 0)


def test_a_thorough_run_serves_a_quick_one_but_not_the_other_way_round(tmp_path):
    Trace(points=(1,)).run(tmp_path, rounds=4)
    assert Trace(points=(1,)).run(tmp_path, quick=True) == (0, 1, 0)
    assert Trace(points=(1,)).run(tmp_path, rounds=5) == (1, 0, 0)
    Trace(points=(3,)).run(tmp_path, quick=True)
    assert Trace(points=(3,)).run(tmp_path) == (1, 0, 0)
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1, 3, 3]  # and no row twice


def test_rows_without_the_price_that_is_asked_for_are_measured_again(tmp_path):
    Trace(points=(1,)).run(tmp_path)
    assert Trace(points=(1,)).run(tmp_path, price_per_hour=2.0) == (1, 0, 0)
    assert Trace(points=(1,)).run(tmp_path, price_per_hour=3.0) == (1, 0, 0)
    assert Trace(points=(1,)).run(tmp_path) == (0, 1, 0)


def test_a_broken_file_is_no_earlier_run(tmp_path):
    (tmp_path / "trace.json").write_text('{"rows": [')
    assert Trace(points=(1,)).run(tmp_path) == (1, 0, 0)


def test_the_source_changes_with_any_file(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(resume, "ROOT", tmp_path)
    (tmp_path / "mla").mkdir()
    seen = set()
    for text in ("", "x = 1\n", "x = 2\n"):
        (tmp_path / "mla" / "a.py").write_text(text)
        resume.source.cache_clear()
        seen.add(resume.source())
    (tmp_path / "mla" / "a.py").rename(tmp_path / "mla" / "b.py")
    resume.source.cache_clear()
    assert len(seen | {resume.source()}) == 4
    monkeypatch.undo()
    resume.source.cache_clear()


# --- memory ------------------------------------------------------------------------------------


def test_a_candidate_without_memory_is_a_row_and_the_run_goes_on(tmp_path, capsys):
    def columns(row):  # as benchmarks compute them
        return {"per_s": 1e3 / float(row["median_ms"] or 0)}

    assert Trace(columns=columns).run(tmp_path) == (3, 0, 1)
    assert rows_in(tmp_path) == [
        (1, "plain", "ok"),
        (1, "greedy", "ok"),
        (2, "plain", "ok"),
        (2, "greedy", "out of memory"),
        (3, "plain", "ok"),
        (3, "greedy", "ok"),
    ]
    document = json.loads((tmp_path / "trace.json").read_text())
    row = document["rows"][3]
    assert row["median_ms"] is row["speedup"] is row["per_s"] is None
    assert "NaN" not in (tmp_path / "trace.json").read_text()
    assert "nan" not in (tmp_path / "trace.csv").read_text()
    shown = capsys.readouterr().out
    assert "out of memory" in shown and "nan" not in shown
    assert Trace(columns=columns).run(tmp_path) == (0, 3, 0)  # it would fail again


def test_a_baseline_without_memory_leaves_the_others_their_times(tmp_path):
    def setup(point, impl):
        if impl == "stock":
            raise MemoryError
        return Candidate(run=lambda: torch.ones(3))

    comparison = sweep.Comparison(impls=("stock", "ours"), setup=setup)
    stock, ours = comparison.rows_at({"S": 1}, sweep.Options(rounds=3), lambda: None)
    assert stock["status"] == "out of memory" and ours["status"] == "ok"
    assert ours["median_ms"] > 0 and ours["speedup"] != ours["speedup"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_point_without_memory_is_a_row_and_the_run_goes_on(tmp_path, capsys, error):
    def fails(point):
        if point["S"] == 3:
            raise error

    assert Trace(fails=fails, points=(1, 3, 4)).run(tmp_path) == (3, 0, 1)
    assert rows_in(tmp_path)[2:3] == [(3, "", "out of memory")]
    assert [S for S, *_ in rows_in(tmp_path)] == [1, 1, 3, 4, 4]
    assert "out of memory" in capsys.readouterr().out


def test_figures_leave_out_rows_without_memory(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    times = {"p20_ms": 1.0, "median_ms": 2.0, "p80_ms": 3.0, "status": "ok"}
    rows = [{"dtype": "float32", "S": S, "impl": "ours", **times} for S in (8, 16)]
    failed = {**dict.fromkeys(times), "status": "out of memory"}
    rows.append({"dtype": "float32", "S": 32, "impl": "ours", **failed})
    rows.append({"dtype": "float32", "S": 64, "status": "out of memory"})
    report.write("layer", rows, tmp_path)
    assert plot.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "layer.png").is_file()


def test_other_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(HUGE, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


# --- filters and shares ------------------------------------------------------------------------


def test_filters():
    point = {"op": "decode", "S": 8, "dtype": "bfloat16"}

    def wants(*only, dtypes=()):
        return sweep.Options(only=only, dtypes=dtypes).wants(point, "cache")

    assert wants() and wants("S=8") and wants("decode") and wants("cache") and wants("8")
    assert wants("decode", "prefill") and wants("cache", "S=8", dtypes=("bfloat16", "float32"))
    assert wants("S=9", "S=8", "op=decode") and not wants("S=9", "S=8", "op=append")
    assert not wants("S=9") and not wants("prefill") and not wants("decode", "S=9")
    assert not wants("S=8", "op=append") and not wants(dtypes=("float32",))
    assert not sweep.Options(dtypes=("float32",)).wants({"S": 8})


def test_dtypes_have_short_names():
    parsed = sweep.parser("x").parse_args(["--dtype", "bf16", "float32", "--threads", "1"])
    assert sweep.options_from(parsed).dtypes == ("bfloat16", "float32")


@pytest.fixture
def machine(monkeypatch):
    """1 GB/s and 4 GFLOP/s."""
    monkeypatch.setattr(ceilings, "bandwidth", lambda kind, device: 1e9)
    monkeypatch.setattr(ceilings, "arithmetic", lambda dtype, device: 4e9)


def test_share_is_of_the_slower_of_memory_and_arithmetic(machine):
    row = {"bytes": 10**6, "flops": 10**6, "cpu_ms": 4.0, "median_ms": 9.0}
    found = ceilings.share_of_limit(row)
    assert found == {"of_limit": pytest.approx(0.25), "limit_ms": 1.0, "bound": "memory"}
    row |= {"flops": 8 * 10**6, "device": "cuda"}
    found = ceilings.share_of_limit(row)
    assert found["of_limit"] == pytest.approx(2 / 9) and found["bound"] == "arithmetic"
    micro = {"bytes": 10**3, "flops": None, "cpu_us": 10.0}
    assert ceilings.share_of_limit(micro)["of_limit"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "row",
    [
        {"bytes": None, "flops": None, "cpu_ms": 1.0},
        {"bytes": 10, "flops": 10},
        {"bytes": 10, "flops": None, "cpu_ms": float("nan")},
    ],
)
def test_a_row_without_work_or_time_has_no_share(row, machine):
    assert ceilings.share_of_limit(row) == {}


def test_ceilings_are_measured_and_written_beside_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "CPU_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings, "CPU_SIZE", 16)
    monkeypatch.setattr(ceilings, "PEAK_STEPS", 1000)
    monkeypatch.setattr(ceilings, "_measured", {})
    for function in (ceilings.bandwidth, ceilings.arithmetic):
        function.cache_clear()
    limit = ceilings.limit_of(10**6, 10, dtype="float32")
    assert limit.seconds > 0 and limit.bound == "memory"
    run.show_ceilings(sweep.Options(out=tmp_path), terminal())
    with (tmp_path / "ceilings.csv").open(newline="") as file:
        found = {row["ceiling"]: float(row["per_second"]) for row in csv.DictReader(file)}
    assert {"read cpu", "copy cpu", "matmul float32 cpu"} <= set(found)
    assert all(value > 0 for value in found.values())
    assert "ceilings, 1e9 bytes or flops a second: copy cpu" in capsys.readouterr().out
    for function in (ceilings.bandwidth, ceilings.arithmetic):
        function.cache_clear()
