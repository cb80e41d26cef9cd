"""Rows of the benchmarks as shares of a device's limits, and the plan held against them."""

import csv

import pytest
import torch

from benchmarks import check_plan
from mla.codec import Fp8Codec, Int8Codec
from mla.config import MLAConfig
from mla.plan import measured
from mla.plan.devices import DEVICES, given_device
from mla.plan.measured import nearest, read_rows, shares
from mla.plan.roofline import ALONE, Group, Load

V3 = MLAConfig.preset("deepseek-v3")
CPU = given_device("cpu", memory=1e11, bytes_per_second=2e10, flops_per_second=1e9)
H100 = DEVICES["h100"]


def cpu_row(**changes):
    return {
        "benchmark": "cpu",
        "dtype": "bfloat16",
        "H": "128",
        "B": "1",
        "S": "4096",
        "impl": "cpp",
        "cpu_ms": "2.0",
        "share": "0.5",
        "device": "A processor, AVX512",
        "threads": "2",
        **changes,
    }


def decode_row(**changes):
    return cpu_row(
        **{
            "benchmark": "decode",
            "codec": "plain",
            "L": "1",
            "Z": "0",
            "share": "",
            "of_limit": "0.25",
            "bound": "memory",
            **changes,
        }
    )


def gpu_row(**changes):
    """Half as fast as 3.35 TB/s allow."""
    return {
        "benchmark": "gpu_decode",
        "impl": "triton",
        "H": "16",
        "B": "64",
        "S": "4096",
        "L": "1",
        "codec": "plain",
        "bytes": "335000000",
        "flops": "1000",
        "median_ms": "0.2",
        "device": "NVIDIA H100 80GB HBM3",
        **changes,
    }


def test_rows_of_processors_carry_their_share():
    rows = [
        cpu_row(),
        cpu_row(impl="int8", share="0.6"),
        decode_row(codec="fp8"),
        decode_row(impl="torch"),
        decode_row(L="2"),
        decode_row(Z="64"),
        cpu_row(impl="bmm"),
        cpu_row(share=""),
        gpu_row(),
    ]
    found = shares(rows, CPU)
    assert [(one.codec, one.share, one.bound) for one in found] == [
        ("plain", 0.5, "arithmetic"),
        ("int8", 0.6, "arithmetic"),
        ("fp8", 0.25, "memory"),
    ]
    assert (found[0].seconds, found[0].device) == (2e-3, "A processor, AVX512, 2 threads")


def test_rows_of_gpus_are_held_against_the_data_sheet():
    rows = [gpu_row(), gpu_row(device="NVIDIA A100"), gpu_row(impl="torch"), gpu_row(L="4")]
    rows += [gpu_row(median_ms=""), gpu_row(flops=str(10**12)), cpu_row()]
    found = shares(rows, H100)
    assert [one.bound for one in found] == ["memory", "arithmetic"]
    assert found[0].share == pytest.approx(0.5)
    assert found[1].share == pytest.approx(1e12 / 989.4e12 / 0.2e-3)
    assert shares(rows, given_device("custom", **LIMITS)) == []


LIMITS = {"memory": 1e9, "bytes_per_second": 1e9, "flops_per_second": 1e9}


def test_the_nearest_row_of_the_same_kind_counts():
    rows = [gpu_row(S=str(S), B=str(B)) for S, B in ((1024, 1), (4096, 64), (65536, 64))]
    found = shares([*rows, gpu_row(H="128"), gpu_row(codec="fp8", H="16")], H100)
    v2 = MLAConfig.preset("deepseek-v2-lite")  # 16 heads

    def near(config, load, group=ALONE):
        return nearest(found, config, load, group, H100)

    assert near(v2, Load(2000)).S == 1024
    assert near(v2, Load(1000, 300)).S == 4096
    assert near(v2, Load(30_000, 100)).S == 65536
    assert near(v2, Load(8192, 64), Group(1, 32)).S == 1024
    assert near(V3, Load(4096), Group(tensor=8)).H == 16
    assert near(V3, Load(4096), Group(tensor=4)) is None  # no row of 32 heads
    assert near(v2, Load(4096, codec=Fp8Codec())).codec == "fp8"
    assert near(v2, Load(4096, codec=Fp8Codec(group=64))) is None  # rows have its defaults
    assert near(v2, Load(4096, codec=Int8Codec())) is None
    assert near(v2, Load(4096, dtype=torch.float16)) is None
    assert near(v2, Load(4096, new_tokens=2)) is None
    assert near(MLAConfig.preset("minicpm3-4b"), Load(4096)) is None  # another width


def test_a_share_counts_where_the_same_limit_binds():
    found = shares([cpu_row(H="16"), decode_row(H="16", of_limit="0.7")], CPU)
    v2 = MLAConfig.preset("deepseek-v2-lite")
    slow = CPU._replace(flops_per_second=1e6)
    fast = CPU._replace(flops_per_second=1e15)
    assert nearest(found, v2, Load(4096), ALONE, slow).share == 0.5
    assert nearest(found, v2, Load(4096), ALONE, fast).share == 0.7


def write(folder, name, rows):
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def test_rows_are_read_by_the_name_of_their_file(tmp_path):
    write(tmp_path, "cpu", [cpu_row(benchmark="?"), cpu_row(H="16")])
    write(tmp_path, "other", [cpu_row()])
    assert [(row["benchmark"], row["H"]) for row in read_rows(tmp_path)] == [
        ("cpu", "128"),
        ("cpu", "16"),
    ]
    assert read_rows(tmp_path / "nothing") == []


@pytest.mark.parametrize("row", [cpu_row(H="many"), cpu_row(share="high")])
def test_a_row_of_something_else_is_refused(row):
    with pytest.raises(ValueError, match=r"shares: a row of cpu.csv has no usable"):
        shares([row], CPU)
    del row["H"]
    with pytest.raises(ValueError, match=r"no usable 'H', expected a row of benchmarks.bench_cpu"):
        shares([{**row, "share": "0.5"}], CPU)


def test_committed_rows_can_be_used():
    folder = measured.default_folder()
    assert folder is not None
    found = shares(read_rows(folder), CPU)
    assert found and all(one.share > 0 and one.seconds > 0 for one in found)


# --- the plan held against rows ----------------------------------------------------------------


def test_each_call_is_predicted_from_the_others():
    """Half of the bound at 4096 rows, three quarters at 16384."""
    rows = [cpu_row(), cpu_row(S="16384", cpu_ms="5.0", share="0.75"), cpu_row(H="16")]
    first, second, alone = check_plan.compare(shares(rows, CPU))
    assert first["bound_ms"] == pytest.approx(1.0) and first["measured_over_bound"] == 2.0
    assert first["predicted_ms"] == pytest.approx(1.0 / 0.75) and first["from_S"] == 16384
    assert first["error"] == pytest.approx(1.0 / 0.75 / 2.0 - 1)
    assert second["error"] == pytest.approx(3.75 / 0.5 / 5.0 - 1)
    assert alone["predicted_ms"] is None and alone["error"] is None


def test_a_bandwidth_bounds_calls_that_compute_little():
    (one,) = shares([cpu_row(H="1", share="0.01", cpu_ms="1.0", S="10000")], CPU)
    wide = check_plan.with_memory(one, 23.04e9)  # 1152 bytes a row: half a millisecond
    assert (wide.bound, wide.share) == ("memory", pytest.approx(0.5))
    assert check_plan.with_memory(one, None) == one
    assert check_plan.with_memory(one, 1e15) == one


def test_check_plan_prints_rows_and_the_error(tmp_path, capsys):
    write(tmp_path, "cpu", [cpu_row(), cpu_row(S="16384", cpu_ms="5.0", share="0.75")])
    assert check_plan.main(["--rows", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Measured time is 1.33 to 2.00 times the bound, median 1.67, over 2 calls." in out
    assert "error -33% to +50%, median size 42%, over 2 calls." in out
    assert check_plan.main(["--rows", str(tmp_path), "--least", "99999"]) == 2
    assert "has no rows to compare with" in capsys.readouterr().err
