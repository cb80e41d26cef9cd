"""benchmarks.plot: figures from rows, whatever points they have."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import plot, plot_decode, plot_style
from benchmarks.report import write

LINE = {"p20_ms": 1.0, "median_ms": 2.0, "p80_ms": 3.0}
DECODE = {"dtype": "bfloat16", "B": 1, "L": 1, "codec": "plain", "Z": 0, "status": "ok"}


def decode_row(impl, ms, *, H=16, S=4096, per_token=1152, bound="memory", **changes):
    """A row that takes twice its limit."""
    return {
        **DECODE, "H": H, "S": S, **changes, "impl": impl, "median_ms": ms, "p20_ms": 0.9 * ms,
        "p80_ms": 1.1 * ms, "bytes": 1000 * per_token, "flops": 30000 * per_token,
        "bytes_per_token": per_token, "us_per_token": 1e3 * ms, "of_limit": 0.5,
        "limit_ms": 0.5 * ms, "bound": bound,
    }  # fmt: skip


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
    "cache": [
        {"op": op, "S": S, "impl": "mla DenseLatentCache", "median_us": 3.0, "p20_us": 2.0,
         "p80_us": 4.0}
        for op in ("append", "decode")
        for S in (1024, 8192)
    ],
    "training_memory": [
        {"L": 512, "impl": impl, "saved_KiB_per_token": 30.0, "median_ms": 300.0}
        for impl in ("plain PyTorch", "mla save=latent")
    ],
    "prefill": [
        {"mode": mode, "dtype": "float32", "H": 16, "L": L, "impl": impl, "over_sdpa": 1.1}
        for mode in ("forward", "training")
        for L in (128, 512)
        for impl in ("sdpa", "torch")
    ],
    "decode": [
        *(decode_row("bmm", 2.0, S=S) for S in (1024, 4096)),
        *(decode_row("cpp", 1.0, S=S, bound="arithmetic") for S in (1024, 4096)),
        decode_row("cpp", 1.0, S=1024, B=4),
        decode_row("kept heads", 9.0, per_token=10240),
        decode_row("cpp", 0.9, codec="int8", per_token=656),
        {**DECODE, "H": 16, "S": 65536, "impl": "kept heads", "status": "out of memory"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", plot.FIGURES_OF)
def test_figures_come_from_rows_alone(name, tmp_path):
    source = plot.FIGURES_OF[name][0]
    write(source, ROWS[source], tmp_path)
    plot.draw(name, plot.read(tmp_path / f"{source}.csv"), tmp_path / "figures")
    png, svg = (tmp_path / "figures" / f"{name}.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_text()
    assert first.rstrip().endswith("</svg>")
    if name == "layer":
        assert plot.main([str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
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


def text_rows(rows):
    """As a file gives them: every column in every row."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: "" if row.get(key) is None else str(row[key]) for key in columns} for row in rows]


def test_speedups_are_over_our_fastest_form_and_roofline_has_the_rows_ceilings():
    from matplotlib.figure import Figure

    rows = text_rows(ROWS["decode"])
    figure = Figure()
    plot_decode.draw_speedups(figure, rows)
    (axis,) = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axis.containers}
    assert heights == {"bmm": [2.0, 2.0], "kept heads": [9.0]}
    # Twice the limit: 1152000 bytes in half of 2 ms; 34560000 flops in half of 1 ms.
    memory = max(1000 * 1152 / 1.0e-3, 1000 * 1152 / 0.5e-3, 1000 * 10240 / 4.5e-3,
                 1000 * 656 / 0.45e-3)  # fmt: skip
    assert plot_decode.ceilings([row for row in rows if row["of_limit"]]) == pytest.approx(
        {"memory": memory, "arithmetic": 30000 * 1152 / 0.5e-3}
    )


def test_a_row_without_memory_has_no_place_in_a_figure():
    from matplotlib.figure import Figure

    for draw in (plot_decode.draw_scaling, plot_decode.draw_roofline, plot_decode.draw_bytes):
        figure = Figure()
        draw(figure, text_rows(ROWS["decode"]))
        assert figure.axes
    figure = Figure()
    plot_decode.draw_scaling(figure, text_rows(ROWS["decode"]))
    context, _ = figure.axes
    places = {line.get_label(): list(line.get_xdata()) for line in context.get_lines()}
    assert places == {"bmm": [1024, 4096], "cpp": [1024, 4096], "kept heads": [4096]}


def test_an_implementation_has_one_colour_everywhere():
    assert plot_style.colour("mla cpp", ["x"]) == plot_style.colour("cpp", [])
    named = plot_style.colour("new", ["cpp", "new", "newer"])
    assert named == plot_style.OTHERS[0]
    assert plot_style.colour("newer", ["cpp", "new", "newer"]) == plot_style.OTHERS[1]


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
    there = {path.stem for path in plot.RESULTS.glob("*.csv")}
    assert drawn == {name for name, (source, _) in plot.FIGURES_OF.items() if source in there}
