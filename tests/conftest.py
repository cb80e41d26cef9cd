"""Settings that hold for every test: threads, drawn examples, the real model, the last line.

Options: `--data-root=DIR` for the folder that `make data` filled; `--hypothesis-profile=thorough`
for many more drawn examples. With the environment variable CI set to `true`, missing data is a
failure instead of a skip and examples are drawn the same way every time.
"""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread for each pytest worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tools.data import DEFAULT_ROOT, DataPaths, find_data
from tools.skip_report import summary_line

torch.set_num_threads(1)

IS_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
DATA_FIXTURES = {"data_paths", "smollm2", "smollm2_tokenizer"}

set_hypothesis_home_dir(Path(__file__).parent.parent / ".cache" / "hypothesis")
# No deadline: a first call compiles. No health check of speed: machines that run tests are busy.
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=20, print_blob=True, **COMMON)
settings.register_profile("ci", max_examples=20, print_blob=True, derandomize=True, **COMMON)
settings.register_profile("gpu", max_examples=8, print_blob=True, **COMMON)  # each one compiles
settings.register_profile("thorough", max_examples=400, print_blob=True, **COMMON)
settings.load_profile("ci" if IS_CI else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-root", type=Path, default=DEFAULT_ROOT, help="the folder that `make data` filled"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of the real model; skip what this machine has no device or compiler for."""
    no_cuda = pytest.mark.skip(reason="no CUDA device")
    no_compiler = pytest.mark.skip(reason="no C++ compiler")
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    for item in items:
        if DATA_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if item.get_closest_marker("inductor") and not has_compiler:
            item.add_marker(no_compiler)


@pytest.fixture(scope="session")
def data_paths(pytestconfig: pytest.Config) -> DataPaths:
    """Where the real model and text lie; skips, or fails in CI, where `make data` has not run."""
    paths = find_data(pytestconfig.getoption("--data-root"))
    if paths is None:
        message = "no model data: run make data"
        if IS_CI:
            pytest.fail(message)
        pytest.skip(message)
    return paths


@pytest.fixture
def smollm2(data_paths: DataPaths) -> Any:
    """SmolLM2-135M-Instruct Q4_1 in float32, loaded anew (0.3 s): a test may change it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data_paths.model, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(data_paths: DataPaths) -> Any:
    """The tokenizer of `smollm2`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_paths.model)


@pytest.fixture(autouse=True)
def _restore_torch_globals() -> Iterator[None]:
    """A test that changes a global of torch does not change it for the tests after it."""
    dtype = torch.get_default_dtype()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    if (
        torch.are_deterministic_algorithms_enabled() != is_deterministic
    ):  # the setter takes a second
        torch.use_deterministic_algorithms(is_deterministic)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the result as the last line, after everything that pytest prints itself."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    stats = reporter.stats
    passed = sum(len(stats.get(kind, [])) for kind in ("passed", "xfailed"))
    failed = sum(len(stats.get(kind, [])) for kind in ("failed", "error", "xpassed"))
    reasons = [report.longrepr[2] for report in stats.get("skipped", [])]
    reporter.write_line(summary_line(passed, failed, reasons))
