"""The report of `make gpu`: goals, wins and plots, from rows that were made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_append, gpu_decode, gpu_measure, gpu_prefill, gpu_report
from benchmarks.harness import Spread
from mla.ops.select import Win

LIMITS = {"copy_bytes_per_second": 3e12, "matmul_flops_per_second": 7e14}
FACTS = {"device": "made up", **LIMITS}


def fill(folder: Path, seconds) -> None:
    """Rows of every point that take what ``seconds`` says; None: the point failed."""
    modules = {"decode": gpu_decode, "prefill": gpu_prefill, "append": gpu_append}
    for part, module in modules.items():
        rows = []
        for point in module.points():
            time = seconds(part, point, module.cost(point))
            spread = None if time is None else Spread(*[1e3 * time] * 3)
            found = gpu_measure.figures(spread, module.cost(point), LIMITS)
            rows.append({**point, "error": "", **found})
        gpu_measure.write(part, rows, FACTS, folder)


def at_85_percent(part, point, cost) -> float:
    """Ours at 85 % of the bound, others twice as slow."""
    bound = max(cost.num_bytes / 3e12, cost.num_flops / 7e14)
    return bound / 0.85 * (1 if point["impl"] == "triton" else 2)


def by_case(folder: Path) -> dict[str, float | None]:
    return {goal.case.strip(): goal.measured for goal in gpu_report.goals(folder)}


def test_goals_are_measured_by_the_worst_of_their_cases(tmp_path):
    fill(tmp_path, at_85_percent)
    found = by_case(tmp_path)
    assert found["decode, 16 heads, batch 64-128"] == pytest.approx(0.85)
    assert found["append of 4096"] == pytest.approx(0.85)
    assert found["against two loads, 128 heads"] == pytest.approx(2)
    assert found["prefill, backward, 8K-16K"] == pytest.approx(2)

    def slower_once(part, point, cost):
        wanted = {"H": 16, "B": 128, "S": 8192, "impl": "triton", "codec": "plain", "Z": 64}
        is_it = wanted.items() <= point.items()
        return at_85_percent(part, point, cost) * (2 if is_it else 1)

    fill(tmp_path, slower_once)
    assert by_case(tmp_path)["decode, 16 heads, batch 64-128"] == pytest.approx(0.425)
    words = gpu_report.table(gpu_report.goals(tmp_path)).splitlines()
    assert words[1].endswith("MISSED") and words[2].endswith("reached")


def test_what_was_not_measured_is_said(tmp_path):
    def no_prefill(part, point, cost):
        is_ours = part == "prefill" and point["impl"] == "triton" and point["L"] == 16384
        return None if is_ours else at_85_percent(part, point, cost)

    fill(tmp_path, no_prefill)
    assert by_case(tmp_path)["prefill, forward, 8K-16K"] is None
    assert gpu_report.wins(tmp_path) == []
    assert "missing" in gpu_report.table(gpu_report.goals(tmp_path))


@pytest.mark.parametrize(("slow", "expected"), [(None, [8192]), (8192, [16384]), (16384, [])])
def test_prefill_wins_from_the_length_where_nothing_above_is_slower(tmp_path, slow, expected):
    def seconds(part, point, cost):
        is_slow = part == "prefill" and point["L"] == slow and point["mode"] == "backward"
        is_slow &= point["impl"] == "triton"
        return at_85_percent(part, point, cost) * (3 if is_slow else 1)

    fill(tmp_path, seconds)
    assert gpu_report.wins(tmp_path) == expected


def test_the_command_prints_and_draws(tmp_path, capsys):
    fill(tmp_path, at_85_percent)
    assert gpu_report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("Win(")]
    row = eval(line.replace("architecture", "'sm90'"), {"torch": torch, "Win": Win})
    assert row == Win("sm90", torch.bfloat16, (192, 128), 8192)
    pytest.importorskip("matplotlib")
    for name in ("gpu_roofline.png", "gpu_prefill.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert gpu_report.main([str(tmp_path)]) == 2
    assert "has no timed rows" in capsys.readouterr().err
