import csv
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import (
    bench_cache,
    bench_capacity,
    bench_import,
    bench_layer,
    bench_training_memory,
    harness,
    report,
    run,
    sweep,
)
from benchmarks.harness import Candidate, GateError, gate, measure, paired_ratio, spread


def test_spread_interpolates_the_percentiles():
    assert spread([10.0, 0.0]) == pytest.approx((5.0, 2.0, 8.0))
    assert spread([3.0]) == (3.0, 3.0, 3.0)


def test_ratio_is_that_of_each_round_so_that_load_cancels():
    assert paired_ratio([10.0, 100.0, 20.0], [1.0, 10.0, 4.0]) == 10.0


def test_candidates_take_turns_and_only_run_is_timed():
    calls = []

    def candidate(name, units=1):
        return Candidate(
            before=lambda: (calls.append(f"{name} before"), time.sleep(0.02)),
            run=lambda: (calls.append(name), time.sleep(0.004))[0],
            after=lambda: calls.append(f"{name} after"),
            units=units,
        )

    timings = measure({"a": candidate("a"), "b": candidate("b", units=2)}, rounds=3)
    turn = ["a before", "a", "a after", "b before", "b", "b after"]
    assert calls == turn * 4  # one turn that does not count
    assert [len(timing.wall) for timing in timings.values()] == [3, 3]
    assert 0.004 <= min(timings["a"].wall) < 0.02
    assert 0.002 <= min(timings["b"].wall) < 0.01
    assert max(timings["a"].cpu) < 0.004  # sleeping takes no processor time


def test_measuring_stops_after_three_rounds_when_time_is_up():
    rounds = []
    candidate = Candidate(run=lambda: None)
    timings = measure({"a": candidate}, rounds=50, seconds=0.0, on_round=lambda: rounds.append(1))
    assert len(timings["a"].wall) == len(rounds) == 3


def test_busiest_thread_counts_work_of_other_threads():
    before = harness.thread_seconds()
    assert before
    deadline = time.thread_time() + 0.05
    while time.thread_time() < deadline:
        pass
    after = harness.thread_seconds()
    assert max(after[thread] - before.get(thread, 0.0) for thread in after) >= 0.045


POINT = {"S": 3, "dtype": "float32"}
TRUTH = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def check(expected=TRUTH, **results):
    gate(results, expected=expected, tolerance=1e-3, point=POINT)


def test_gate_passes_what_agrees():
    check(baseline=TRUTH + 1e-4, other=TRUTH - 2e-4)
    check(expected=None, baseline=TRUTH.float(), other=TRUTH.float() + 1e-4)


@pytest.mark.parametrize("wrong", [TRUTH + 0.01, TRUTH * float("nan"), TRUTH[:2]])
def test_gate_refuses_a_wrong_candidate_and_names_it(wrong):
    with pytest.raises(GateError, match=r"other at S=3 dtype=float32"):
        check(baseline=TRUTH, other=wrong)
    with pytest.raises(GateError, match=r"baseline at S=3"):
        check(baseline=wrong, other=TRUTH)


def test_gate_allows_twice_the_error_of_the_baseline_and_half_the_tolerance():
    check(baseline=TRUTH + 3e-3, other=TRUTH + 5e-3)
    with pytest.raises(GateError, match="other"):
        check(baseline=TRUTH + 3e-3, other=TRUTH + 7e-3)
    check(baseline=TRUTH, other=TRUTH + 1.9e-3)
    with pytest.raises(GateError, match="other"):
        check(baseline=TRUTH, other=TRUTH + 2.1e-3)


def test_rows_are_written_with_their_environment(tmp_path):
    rows = [{"S": 2, "impl": "a", "median_ms": 1.5}, {"S": 2, "impl": "b", "extra": None}]
    csv_path, json_path = report.write("example", rows, tmp_path / "new")
    with csv_path.open() as file:
        table = list(csv.DictReader(file))
    versions = ["python", "torch", "triton", "transformers", "mla"]
    surroundings = ["device", "driver", "threads", *versions]
    columns = ["benchmark", "S", "impl", "median_ms", *surroundings, "commit", "extra"]
    assert list(table[0]) == columns
    assert table[0]["median_ms"] == "1.5" and table[1]["median_ms"] == ""
    assert table[0]["torch"] == torch.__version__ and table[0]["commit"]
    document = json.loads(json_path.read_text())
    assert document["rows"][0]["median_ms"] == 1.5
    assert set(document["environment"]) == {*surroundings, "commit"}


def benchmark_of(*, wrong=False):
    """Two candidates at two points, of which the second may be wrong."""

    def setup(point, impl):
        shift = float(wrong and impl == "new")
        return Candidate(run=lambda: torch.arange(4.0) + point["S"] + shift)

    comparison = sweep.Comparison(impls=("plain", "new"), setup=setup)
    return sweep.Benchmark(
        name="example",
        title="An example",
        points=lambda quick: [{"S": 1}, {"S": 2}],
        rows_at=comparison.rows_at,
        hidden=("flops",),
    )


def test_command_line_measures_the_wanted_points(tmp_path, capsys):
    arguments = ["--rounds", "3", "--threads", "1", "--out", str(tmp_path)]
    assert sweep.main(benchmark_of(), [*arguments, "--only", "S=2"]) == 0
    rows = json.loads((tmp_path / "example.json").read_text())["rows"]
    assert [(row["S"], row["impl"], row["rounds"]) for row in rows] == [
        (2, "plain", 3),
        (2, "new", 3),
    ]
    assert rows[0]["speedup"] == 1.0 and rows[1]["median_ms"] > 0
    shown = capsys.readouterr().out
    assert "An example" in shown and "median ms" in shown and "flops" not in shown


def test_command_line_refuses_in_one_line(tmp_path, capsys):
    arguments = ["--rounds", "3", "--threads", "1", "--out", str(tmp_path)]
    assert sweep.main(benchmark_of(wrong=True), arguments) == 1
    assert capsys.readouterr().err.strip().startswith("example: failed: new at S=1: error")
    assert sweep.main(benchmark_of(), [*arguments, "--only", "S=3"]) == 2
    assert capsys.readouterr().err.strip() == "example: failed: no point has S=3"
    assert run.main(["nothing"]) == 2
    assert capsys.readouterr().err.strip() == "bench: failed: no benchmark nothing"
    assert not list(tmp_path.iterdir())


def test_a_quick_run_of_all_leaves_out_the_long_ones_and_says_so(tmp_path, monkeypatch, capsys):
    short, long = benchmark_of(), replace(benchmark_of(), name="slow", is_long=True)
    monkeypatch.setattr(run, "all_benchmarks", lambda: {"example": short, "slow": long})
    arguments = ["--quick", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    assert not (tmp_path / "slow.csv").exists()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2] == "bench: left out of a quick run, each runs by its name: slow"
    assert lines[-1] == f"bench: passed, 2 points measured; rows in {tmp_path}"
    assert run.main([*arguments, "slow"]) == 0
    assert (tmp_path / "slow.csv").exists()
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("bench: passed, 2 points")
    monkeypatch.setattr(run, "all_benchmarks", lambda: {"example": benchmark_of(wrong=True)})
    assert run.main([*arguments, "--fresh"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1] == "bench: failed: wrong results in example"


def test_what_cannot_run_here_is_left_out_with_its_reason(tmp_path, capsys):
    benchmark = replace(benchmark_of(), reason_absent=lambda: "no data; run make data")
    options = sweep.Options(out=tmp_path)
    assert sweep.run(benchmark, options, report.terminal()).all == 0
    assert capsys.readouterr().out == "example: skipped: no data; run make data\n"
    assert sweep.main(benchmark, ["--threads", "1"]) == 2
    assert capsys.readouterr().err == "example: failed: no data; run make data\n"


def test_every_benchmark_is_found_and_is_shorter_when_quick():
    benchmarks = run.all_benchmarks()
    assert set(benchmarks) >= {"layer", "import", "cache", "training_memory"}
    for name, benchmark in benchmarks.items():
        assert (report.ROOT / "benchmarks" / f"bench_{name}.py").is_file()
        assert 0 < len(benchmark.points(True)) <= len(benchmark.points(False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_steps_agree_with_the_oracle_and_are_taken_back(dtype):
    pytest.importorskip("transformers")
    point = {"dtype": dtype, "S": 33}
    results = {}
    for impl in bench_layer.IMPLS:
        candidate = bench_layer.setup(point, impl)
        candidate.before()
        results[impl] = candidate.run()
        candidate.after()
        assert torch.equal(candidate.run(), results[impl])
    gate(
        results,
        expected=bench_layer.expected(point),
        tolerance=sweep.TOLERANCES[dtype],
        point=point,
    )


def test_cache_holds_at_most_one_growth_factor():
    worst, mebibytes = bench_cache.memory(1024, "mla DenseLatentCache")
    assert 1.0 < worst <= bench_cache.GROWTH
    assert mebibytes == pytest.approx(1536 * 576 * 4 / 2**20)
    worst, mebibytes = bench_cache.memory(1024, bench_cache.PAGED)
    assert 1.0 < worst <= bench_cache.LIMITS[bench_cache.PAGED]
    assert mebibytes == pytest.approx(1536 * 576 * 4 / 2**20)
    pytest.importorskip("transformers")
    assert bench_cache.memory(64, "transformers DynamicCache")[0] == 1.0


def test_cache_candidate_appends_what_it_claims():
    candidate = bench_cache.setup({"S": 128}, "mla DenseLatentCache")
    candidate.before()
    candidate.run()
    candidate.after()
    assert candidate.units == 64


def test_cache_layouts_decode_the_same():
    point = {"op": "decode", "S": 192}
    results = {
        impl: bench_cache.setup_decode(point, impl).run() for impl in bench_cache.DECODE.impls
    }
    assert len(results) == 2
    gate(results, expected=None, tolerance=1e-5, point=point)


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = nn.Linear(3, 5, bias=False)
    x = torch.ones(7, 3, requires_grad=True)

    def forward(x):
        y = layer(x)  # saves x and the weight
        return (y * y[:]).sum()  # saves y twice

    assert bench_training_memory.saved_bytes(forward, x, layer.parameters()) == 4 * (7 * 3 + 7 * 5)


def test_training_keeps_less_in_latent_form_and_gradients_agree():
    pytest.importorskip("transformers")
    point = {"L": 16}
    kept, gradients = {}, {}
    for impl in bench_training_memory.IMPLS:
        candidate = bench_training_memory.setup(point, impl)
        gradients[impl] = candidate.run().clone()
        candidate.after()
        kept[impl] = bench_training_memory.saved_bytes(
            bench_training_memory.forward_of(impl, 16),
            bench_training_memory.hidden_states(16),
            bench_training_memory.our_layer().parameters(),
        )
    gate(gradients, expected=None, tolerance=1e-4, point=point)
    expanded, latent = kept["mla save=expanded"], kept["mla save=latent"]
    assert expanded - latent == 16 * 16 * (128 + 128) * 4  # L * H * (N + V) float32 numbers
    assert latent < expanded < kept["plain PyTorch"]


def test_import_trace_has_our_modules_and_not_those_of_torch():
    times = bench_import._own_times()
    assert "mla.module" in times and "mla" in times
    assert "torch" not in times and all(value >= 0 for value in times.values())


def test_environment_survives_a_missing_git(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(
        report, "subprocess", SimpleNamespace(run=missing, CalledProcessError=OSError)
    )
    assert report.commit() == "unknown"
    assert report._version("no-such-package") == "none"


def test_bytes_of_a_token_are_those_of_its_rows_in_all_layers():
    """DeepSeek-V3: 576 numbers, 656 bytes and 400 bytes in each of 61 layers."""
    found = [bench_capacity.bytes_of("deepseek-v3", rows) for rows in bench_capacity.CODECS]
    assert found == [61 * 1152, 61 * 656, 61 * 656, 61 * 400]
