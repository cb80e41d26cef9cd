"""`make gpu` without a GPU: arguments, points, files, and what it does when a point fails."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_measure, gpu_run, gpu_tests, roofline
from benchmarks.gpu_measure import Task
from benchmarks.gpu_run import Options, failures, run_points
from benchmarks.harness import Spread
from mla.codec import Fp8Codec, PlainCodec

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("decode", "prefill", "append", "tune")
LIMITS = {"copy_bytes_per_second": 2e12, "matmul_flops_per_second": 4e14}


def dry_run(part: str, out: Path, *more: str) -> int:
    return gpu.main(["--out", str(out), "--commit", "abc", "--part", part, "--dry-run", *more])


@pytest.mark.parametrize("part", BENCHMARKS)
def test_a_dry_run_writes_every_point_without_times(part, tmp_path, capsys):
    assert dry_run(part, tmp_path) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    points = gpu_run.MODULES[part].points()
    assert last.startswith(f"gpu: passed: {part} {len(points)} of {len(points)} points; ")
    document = json.loads((tmp_path / f"gpu_{part}.json").read_text())
    assert document["environment"]["commit"] == "abc"
    assert {"device", "driver", "torch", "triton"} <= set(document["environment"])
    with (tmp_path / f"gpu_{part}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["rows"]) == len(points)
    assert all(row["median_ms"] == row["error"] == "" and row["commit"] == "abc" for row in rows)
    assert all(int(row["bytes"]) > 0 for row in rows)


def test_a_dry_run_of_the_tests_collects_them(tmp_path):
    assert dry_run("tests", tmp_path) == 0
    names = {row["test"] for row in gpu_measure.read("tests", tmp_path)[1]}
    assert "tests/kernels/test_triton_decode.py::test_matches_the_oracle" in names
    assert "tests/kernels/test_triton_cuda.py::test_auto_takes_these_kernels" in names
    assert all(len(group) <= gpu_tests.MOST_CASES for group in gpu_tests.collect())
    assert not any("test_variants" in name for name in names)  # they compile, on any machine


def test_all_is_every_part_that_fits_ten_minutes():
    assert set(gpu.SHARES) == {"tests", "decode", "prefill", "append"}
    assert gpu.parser().parse_args(["--out", "x"]).seconds <= 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_only_chooses_points(tmp_path):
    assert dry_run("decode", tmp_path, "--only", "H=128", "impl=engines") == 0
    rows = gpu_measure.read("decode", tmp_path)[1]
    assert rows and all((row["H"], row["impl"]) == (128, "engines") for row in rows)


def test_the_make_target_passes_its_variables():
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-n", "gpu", "OUT=some/dir", "COMMIT=abc", "PART=append"]
    command += ["GPU_ARGS=--dry-run", "GPU_PYTHON=python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = " ".join(done.stdout.replace("\\\n", " ").split())
    assert 'python3 -m benchmarks.gpu --out "some/dir" --commit "abc"' in words
    assert '--part "append" --dry-run' in words


POINTS = [{"impl": "triton", "S": S} for S in (1, 2, 3, 4)]


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Points 1 to 4 of a part named decode, timed by a stub; the list says which ran."""
    ran: list[int] = []

    def prepare(point):
        ran.append(point["S"])
        return Task(lambda: None, roofline.Cost(10**9, 10**12))

    module = SimpleNamespace(
        points=lambda: POINTS,
        prepare=prepare,
        verify=lambda point: None,
        verify_key=lambda point: point["S"],
    )
    monkeypatch.setitem(gpu_run.MODULES, "decode", module)
    monkeypatch.setattr(gpu_measure, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(gpu_measure, "time_call", lambda task: Spread(1.0, 0.9, 1.2))
    return ran


def run(out: Path, **changes) -> list[dict]:
    return run_points("decode", Options(out=out, **changes), say=lambda text: None)


def test_speeds_are_shares_of_what_was_measured(measured, tmp_path):
    row = run(tmp_path)[0]
    assert row["bytes_per_second"] == pytest.approx(1e12)
    assert row["share_of_copy"] == pytest.approx(0.5)
    assert row["share_of_matmul"] == pytest.approx(2.5)
    assert gpu_measure.read("decode", tmp_path)[0]["copy_bytes_per_second"] == 2e12


def test_a_second_run_goes_on_where_the_first_stopped(measured, tmp_path):
    run(tmp_path, only=("S=1",))
    assert measured == [1]
    run(tmp_path)
    assert measured == [1, 2, 3, 4]
    run(tmp_path)
    assert measured == [1, 2, 3, 4], "nothing is left"
    run(tmp_path, fresh=True)
    assert measured == [1, 2, 3, 4] * 2
    assert len(run(tmp_path, commit="other")) == 4
    assert measured == [1, 2, 3, 4] * 3, "another commit is measured anew"


def test_out_of_memory_loses_one_point(measured, tmp_path, monkeypatch):
    def time_call(task):
        if measured[-1] == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Spread(1.0, 0.9, 1.2)

    monkeypatch.setattr(gpu_measure, "time_call", time_call)
    rows = run(tmp_path)
    assert [row["error"] for row in rows] == ["", "out of memory", "", ""]
    assert failures(rows) == [] and gpu.verdict("decode", tmp_path)[0]


def test_a_point_that_kills_the_process_is_passed_over_next_time(measured, tmp_path, monkeypatch):
    def time_call(task):
        if measured[-1] == 2:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return Spread(1.0, 0.9, 1.2)

    monkeypatch.setattr(gpu_measure, "time_call", time_call)
    monkeypatch.setattr(gpu_run, "is_device_lost", lambda: measured[-1] == 2)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path)
    rows = run(tmp_path)
    assert [row["error"] for row in rows] == ["", "did not finish", "", ""]
    assert measured == [1, 2, 3, 4]
    assert not gpu.verdict("decode", tmp_path)[0]


def test_an_error_that_leaves_the_device_alive_loses_one_point(measured, tmp_path, monkeypatch):
    def time_call(task):
        if measured[-1] == 2:
            raise RuntimeError("CUDA error: invalid argument")
        return Spread(1.0, 0.9, 1.2)

    monkeypatch.setattr(gpu_measure, "time_call", time_call)
    rows = run(tmp_path)
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]
    assert failures(rows) == [rows[1]]


@pytest.mark.parametrize(("error", "lost"), [(None, False), (RuntimeError("CUDA error"), True)])
def test_the_device_itself_says_whether_it_is_lost(monkeypatch, error, lost):
    def synchronize():
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_run.is_device_lost() == lost


def test_short_calls_share_one_measurement(monkeypatch):
    import triton.testing

    made = []
    calls = [lambda i=i: made.append(i) for i in range(4)]

    def do_bench(run, **options):
        run()
        return [4.0, 2.0, 8.0]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    task = Task(gpu_measure.in_turn(calls), roofline.Cost(1, 1), capture=False, calls=4)
    assert gpu_measure.time_call(task) == Spread(1.0, 0.5, 2.0)
    assert made == [0, 1, 2, 3]
    sizes = (1, 10**7, 75 * 10**6, 3 * 10**8)
    assert [gpu_measure.num_calls(roofline.Cost(n, 0)) for n in sizes] == [16, 16, 4, 1]


def test_points_that_are_out_of_time_are_tried_again(measured, tmp_path):
    rows = run(tmp_path, seconds=-1.0)
    assert measured == [] and {row["error"] for row in rows} == {"out of time"}
    assert gpu.verdict("decode", tmp_path) == (True, "decode 0 of 4 points, 4 out of time")
    assert not any(row["error"] for row in run(tmp_path))


def test_a_wrong_kernel_is_not_timed_and_fails_the_part(measured, tmp_path, monkeypatch):
    def verify(point):
        raise gpu_run.GateError("error 1.0, allowed 0.1")

    monkeypatch.setattr(gpu_run.MODULES["decode"], "verify", verify)
    rows = run(tmp_path)
    assert measured == [] and all("GateError" in row["error"] for row in rows)
    assert not gpu.verdict("decode", tmp_path)[0]


def test_a_foreign_backend_that_cannot_run_is_no_failure():
    rows = [{"impl": "cudnn", "error": "RuntimeError: no"}, {"impl": "triton", "error": ""}]
    assert failures(rows) == []


def test_a_part_is_started_again_after_a_crash_and_stops_without_progress(tmp_path, monkeypatch):
    starts = []

    def crash(command, seconds):
        starts.append(command)
        rows = [{"impl": "triton", "error": ""}] * min(len(starts), 3)
        gpu_measure.write("decode", rows, {}, tmp_path)
        return -11

    monkeypatch.setattr(gpu, "_status", crash)
    arguments = gpu.parser().parse_args(["--out", str(tmp_path), "--fresh"])
    passed, words = gpu._run_part("decode", arguments, "abc", 500.0)
    assert not passed and words.endswith("exit status -11")
    assert len(starts) == 4 and "--fresh" in starts[0] and "--fresh" not in starts[1]
    assert starts[0][:3] == [sys.executable, "-m", "benchmarks.gpu"]


def test_a_part_that_runs_out_of_time_leaves_no_process_behind(tmp_path):
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu._status([sys.executable, "-c", parent], 3.0) is None
    pid = int(note.read_text())
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the child of a part lives on")


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_outcomes_that_are_there_survive_the_end_of_the_tests(tmp_path, monkeypatch):
    groups = [["tests/a.py::test_a"], ["tests/b.py::test_b", "tests/b.py::test_c"]]

    def run_group(tests, deadline):
        if tests == groups[0]:
            return [gpu_tests._row(tests[0], "passed", 1.0, "")]
        time.sleep(0.2)  # the first group has been written by then
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_tests, "collect", lambda: groups)
    monkeypatch.setattr(gpu_tests, "run_group", run_group)
    with pytest.raises(KeyboardInterrupt):
        gpu_tests.run_tests(Options(out=tmp_path))
    rows = gpu_measure.read("tests", tmp_path)[1]
    assert [row["outcome"] for row in rows] == ["passed", "not run", "not run"]
    assert [row["error"] for row in rows] == ["", *[gpu_run.UNFINISHED] * 2]


def test_a_tree_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu._git_commit() == "unknown"


def test_outcomes_are_read_from_pytests_report(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='later')\ndef test_c(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "--rootdir", str(tmp_path), "test_x.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    rows = {row["test"]: row for row in gpu_tests.parse(report)}
    outcomes = {test.rpartition("::")[2]: row["outcome"] for test, row in rows.items()}
    assert outcomes == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert "assert 1 == 2" in rows["test_x.py::test_b"]["error"]


def test_pairs_are_those_of_a_causal_mask():
    for L, S in ((1, 1), (1, 9), (4, 9), (7, 7)):
        mask = torch.ones(L, S).tril(S - L)
        assert roofline.causal_pairs(L, S) == int(mask.sum())


def test_costs_count_the_tensors_that_are_there():
    B, S, L, H, C, R = 2, 5, 1, 3, 32, 16
    for codec in (PlainCodec(), Fp8Codec(group=16)):
        width = codec.row_width(C, R)
        rows = torch.empty(B, S, width, dtype=codec.storage_dtype(torch.bfloat16))
        others = [torch.empty(B, L, H, n, dtype=torch.bfloat16) for n in (C, R, C)]
        lse = torch.empty(B, L, H)
        cost = roofline.decode(B, S, L, H, C, R, row_bytes=rows[0, 0].nbytes, size=2, num_splits=3)
        assert cost.num_bytes == sum(x.nbytes for x in (rows, *others, lse))
        partials = torch.empty(3, B, L, H, C + 1)
        assert cost.partial_bytes == 2 * partials.nbytes
        assert cost.num_flops == 2 * B * H * S * (C + R + C)


def test_costs_of_the_kernels_between_count_the_tensors_that_are_there():
    B, L, H, C, N, V, X, half = 2, 3, 5, 32, 8, 4, 7, torch.bfloat16
    parts, lse = torch.empty(X, B, L, H, C), torch.empty(X + 1, B, L, H)
    out = torch.empty(B, L, H, C, dtype=half)
    found = roofline.merge(B, L, H, C, size=2, num_splits=X)
    assert found.num_bytes == sum(x.nbytes for x in (parts, lse, out))
    found = roofline.rotate(B * L * H, C, size_in=4, size_out=2)
    assert found.num_bytes == out.float().nbytes + out.nbytes
    latent, weight = torch.empty(B * L, C, dtype=half), torch.empty(H * (N + V), C, dtype=half)
    found = roofline.expand(B * L, H, C, N, V, size=2)
    assert found.num_bytes == sum(x.nbytes for x in (latent, weight, latent @ weight.T))
    assert found.num_flops == 2 * latent.numel() * H * (N + V)


def test_bounds_name_what_limits():
    machine = roofline.Machine("m", 1e12, 1e15)
    assert roofline.bound(roofline.Cost(2 * 10**12, 10**15), machine) == (2.0, "memory")
    assert roofline.bound(roofline.Cost(10**12, 3 * 10**15), machine) == (3.0, "arithmetic")
    assert {name.split()[0] for name, _ in roofline.cases()} == {
        "decode", "merge", "rotate", "expand", "prefill", "backward", "append"
    }  # fmt: skip


def test_the_page_shows_what_the_command_prints(capsys):
    roofline.main()
    _, _, table = capsys.readouterr().out.partition("\n")
    assert table in (ROOT / "benchmarks" / "README.md").read_text()
