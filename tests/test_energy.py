"""Joules from counters that are made up: what counts, what wraps, and what cannot be read."""

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_models, energy
from benchmarks.energy import EnergyMeter, Nvml, Rapl, cost_columns, joules_per_token
from benchmarks.sweep import Options

ZONES = {
    "intel-rapl:0": ("package-0", 1000),
    "intel-rapl:0:0": ("core", 1000),
    "intel-rapl:0:1": ("dram", 500),
    "intel-rapl:1": ("package-1", 1000),
    "intel-rapl:2": ("psys", 9000),
    "intel-rapl-mmio:0": ("package-0", 1000),
}


def tree(root, zones=ZONES, energy_uj=0):
    """A powercap folder."""
    for folder, (name, range_uj) in zones.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "name").write_text(f"{name}\n")
        (root / folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (root / folder / "energy_uj").write_text(f"{energy_uj}\n")
    return root


def move(root, zone, value):
    (root / zone / "energy_uj").write_text(f"{value}\n")


def test_packages_and_their_memory_count_once(tmp_path):
    """Cores are part of the package, psys and mmio show the same energy again."""
    root = tree(tmp_path)
    with EnergyMeter(source=Rapl(root)) as meter:
        for number, zone in enumerate(ZONES):
            move(root, zone, 10**number)
    assert meter.joules == pytest.approx(1e-6 * (1 + 100 + 1000))
    assert meter.source == "RAPL package-0, dram of intel-rapl:0, package-1"
    assert meter.reason_absent is None and meter.seconds > 0


@given(before=st.integers(0, 1000), used=st.integers(1, 1000))
def test_a_counter_that_wraps_is_read_on(before, used):
    """It shows 0 after its range: 1001 values."""
    source = object.__new__(Rapl)
    source.zones = [energy.Zone("package-0", energy.POWERCAP, 1000)]
    assert source.joules([before], [(before + used) % 1001]) == pytest.approx(1e-6 * used)


def test_a_counter_that_stands_still_gives_no_joules(tmp_path):
    with EnergyMeter(source=Rapl(tree(tmp_path, energy_uj=7))) as meter:
        pass
    assert meter.joules is None and "did not move" in meter.reason_absent


def test_a_counter_that_disappears_gives_no_joules(tmp_path):
    root = tree(tmp_path)
    with EnergyMeter(source=Rapl(root)) as meter:
        move(root, "intel-rapl:1", "much")
    assert meter.joules is None and "is no number" in meter.reason_absent
    with meter:
        pass
    assert meter.joules is None and meter.reason_absent.startswith("no energy: RAPL")


def test_a_counter_for_root_alone_is_said_in_one_line(tmp_path, monkeypatch):
    root = tree(tmp_path)
    (root / "intel-rapl:0" / "energy_uj").unlink()
    (root / "intel-rapl:0" / "energy_uj").mkdir()  # cannot be read, by root neither
    monkeypatch.setattr(energy, "POWERCAP", root)
    with EnergyMeter() as meter:
        pass
    assert meter.joules is None and not meter.is_able and meter.source is None
    assert meter.reason_absent.startswith("no energy: ") and "\n" not in meter.reason_absent


def test_a_machine_without_counters_says_so_and_no_step_is_wasted(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = EnergyMeter()
    assert "has no package or dram counter" in meter.reason_absent
    assert joules_per_token(lambda: pytest.fail("called"), meter=meter) is None


def test_an_error_in_the_block_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), EnergyMeter(source=Rapl(tree(tmp_path))):
        raise RuntimeError("mine")


@pytest.mark.parametrize("seconds", [0.0, 0.003])
def test_joules_are_shared_by_the_tokens_of_all_steps(tmp_path, seconds):
    root, steps, taken_back = tree(tmp_path), [], []

    def step():
        steps.append(1)
        move(root, "intel-rapl:0", 6 * len(steps) % 1001)

    def used_joules(before, after):
        return 6e-6 * len(steps)

    source = Rapl(root)
    source.joules = used_joules  # any number of turns
    found = joules_per_token(
        step,
        meter=EnergyMeter(source=source),
        tokens=3,
        seconds=seconds,
        after=lambda: taken_back.append(1),
    )
    assert len(steps) == len(taken_back) and (len(steps) == 1 or seconds)
    assert found == pytest.approx(2e-6)


class NVMLError(Exception):
    pass


def fake_pynvml(readings, **replaced):
    """The part of the library that is used; total energy in mJ."""
    module = types.ModuleType("pynvml")
    left = iter(readings)
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(left)
    for name, function in replaced.items():
        setattr(module, name, function)
    return module


def fail(*arguments):
    raise NVMLError("Not Supported")


def test_nvml_gives_millijoules_of_the_gpu_with_that_uuid(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([5, 1000, 4500]))
    source = Nvml("12-34")
    assert source.name == "NVML GPU-12-34"
    with EnergyMeter(source=source) as meter:
        pass
    assert meter.joules == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "pynvml is not installed; pip install nvidia-ml-py"),
        (fake_pynvml([], nvmlInit=fail), "NVML: Not Supported"),
        (fake_pynvml([], nvmlDeviceGetHandleByUUID=fail), "NVML: Not Supported"),
        (fake_pynvml([], nvmlDeviceGetTotalEnergyConsumption=fail), "NVML: Not Supported"),
    ],
)
def test_nvml_that_cannot_be_used_says_so(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(OSError, match=message):
        Nvml("GPU-1")


def test_a_gpu_counter_that_fails_later_gives_no_joules(monkeypatch):
    module = fake_pynvml([5, 1000])
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with EnergyMeter(source=Nvml("1")) as meter:
        module.nvmlDeviceGetTotalEnergyConsumption = fail
    assert meter.joules is None and meter.reason_absent == "no energy: NVML: Not Supported"


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_devices_without_counters_say_so(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with EnergyMeter(device) as meter:
        pass
    assert meter.joules is None
    assert meter.reason_absent.startswith(f"no energy: there is no counter for {device} in")


def test_a_gpu_is_found_by_its_uuid_and_waited_for(monkeypatch):
    waits = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml([5, 1000, 4500]))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    properties = types.SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with EnergyMeter("cuda:1") as meter:
        assert waits == [torch.device("cuda:1")]
    assert meter.joules == pytest.approx(3.5) and meter.source == "NVML GPU-12-34"
    assert len(waits) == 2


def test_columns_are_empty_where_nothing_is_known():
    assert cost_columns(4.0, joules_per_token=None, price_per_hour=None) == {
        "joules_per_token": None,
        "cost_per_million_tokens": None,
    }
    # 0.72 an hour are 0.0002 a second, for 4 tokens.
    found = cost_columns(4.0, joules_per_token=2.5, price_per_hour=0.72)
    assert found == {"joules_per_token": 2.5, "cost_per_million_tokens": pytest.approx(50.0)}
    assert (
        cost_columns(None, joules_per_token=None, price_per_hour=1.0)["cost_per_million_tokens"]
        is None
    )


def test_whole_models_have_the_columns(tmp_path, monkeypatch, capsys):
    root, taken_back = tree(tmp_path), []
    rows = [{"impl": "fast", "median_ms": 50.0}, {"impl": "large", "median_ms": float("nan")}]
    comparison = types.SimpleNamespace(rows_at=lambda *_: rows)

    def setup(point, impl):
        assert impl == "fast"  # the other one had no memory
        counter = iter(range(10**9))
        return types.SimpleNamespace(
            run=lambda: move(root, "intel-rapl:0", 2 * next(counter) % 1000 + 2),
            after=lambda: taken_back.append(1),
        )

    monkeypatch.setattr(bench_models, "COMPARISON", comparison)
    monkeypatch.setattr(bench_models, "setup", setup)
    monkeypatch.setattr(energy, "POWERCAP", root)
    monkeypatch.setattr(bench_models, "seconds_of_energy", lambda quick: 0.0)
    options = Options(price_per_hour=7.2)
    fast, large = bench_models.rows_at({"model": "m"}, options, lambda: None)
    assert fast["joules_per_token"] == pytest.approx(2e-6) and taken_back == [1]
    assert fast["cost_per_million_tokens"] == pytest.approx(100.0)  # 20 tokens/s
    assert large["joules_per_token"] is None and large["cost_per_million_tokens"] is None
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    fast, _ = bench_models.rows_at({"model": "m"}, Options(), lambda: None)
    assert fast["joules_per_token"] is None and fast["cost_per_million_tokens"] is None
    assert "joules_per_token left out: no energy" in capsys.readouterr().err


def test_the_device_of_a_meter_may_be_a_torch_device(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tree(tmp_path))
    assert EnergyMeter(torch.device("cpu")).is_able
