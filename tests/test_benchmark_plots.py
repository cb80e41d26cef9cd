"""benchmarks.plot: figures from rows, whatever points they have."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import plot
from benchmarks.report import write

LINE = {"p20_ms": 1.0, "median_ms": 2.0, "p80_ms": 3.0}
ROWS = {
    "layer": [
        {"dtype": dtype, "S": S, "impl": impl, **LINE}
        for dtype in ("float32", "bfloat16")
        for S in (512, 2048)
        for impl in ("stock", "ours")
    ],
    "models": [
        {"model": "m", "S": S, "impl": impl, "tokens_per_s": 3.0}
        for S in (1024, 4096)
        for impl in ("stock", "cpp")
    ],
    "cpu": [
        {"dtype": "float32", "H": 16, "B": 1, "S": 512, "impl": "bmm", "share": 0.2},
        {"dtype": "float32", "H": 16, "B": 1, "S": 4096, "impl": "bmm", "share": 0.1},
        {"dtype": "float32", "H": 16, "B": 1, "S": 4096, "impl": "cpp", "share": 0.8},
        {"dtype": "float32", "H": 128, "B": 1, "S": 4096, "impl": "cpp", "share": 0.9},
        {"dtype": "float32", "H": 128, "B": 2, "S": 4096, "impl": "cpp", "share": None},
    ],
    "codecs": [
        {"model": "m", "codec": codec, "bytes_per_token": size, "ratio": 1.1, "ratio_error": 0.1}
        for codec, size in (("plain", 100), ("int8", 60))
    ],
    "capacity": [{"model": "m", "rows": "plain", "bytes_per_token": 100.0, "sequences": 3}],
}


@pytest.mark.parametrize("name", plot.FIGURES_OF)
def test_figures_come_from_rows_alone(name, tmp_path):
    write(name, ROWS[name], tmp_path)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    png, svg = (tmp_path / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_text()
    assert first.rstrip().endswith("</svg>")
    plot.main([str(tmp_path), "--out", str(tmp_path / "figures")])
    assert svg.read_text() == first  # nothing but the rows decides


def test_bars_are_those_of_the_longest_context_at_batch_1():
    from matplotlib.figure import Figure

    rows = [{key: "" if v is None else str(v) for key, v in row.items()} for row in ROWS["cpu"]]
    figure = Figure()
    plot.draw_cpu(figure, rows)
    (axis,) = figure.axes
    heights = {
        container.get_label(): [bar.get_height() for bar in container]
        for container in axis.containers
    }
    assert heights == {"bmm": [0.1], "cpp": [0.8, 0.9]}


def test_a_folder_without_rows_is_one_line(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"plot: failed: {tmp_path} has none of layer.csv")
    write("layer", ROWS["layer"], tmp_path)
    header = (tmp_path / "layer.csv").read_text().splitlines()[0]
    (tmp_path / "layer.csv").write_text(header + "\n")
    assert plot.main([str(tmp_path)]) == 2
    assert "layer.csv has no rows" in capsys.readouterr().err
    write("layer", [{"dtype": "float32", "impl": "ours", **LINE}], tmp_path)
    assert plot.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "layer.csv has no column 'S'" in capsys.readouterr().err


def test_the_committed_rows_can_be_drawn(tmp_path):
    assert plot.main(["--out", str(tmp_path)]) == 0
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {path.stem for path in plot.RESULTS.glob("*.csv")} & set(plot.FIGURES_OF)
