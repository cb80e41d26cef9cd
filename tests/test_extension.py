"""The C++ extension: it is there where it can be, and the package is complete without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla.kernels import cpu
from mla.ops import supported_impls
from mla.ops.select import Case, resolve

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = shutil.which("c++") is not None


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_extension_is_built_where_there_is_a_compiler():
    assert cpu.reason_absent() is None, "run make env"
    assert cpu.describe().instruction_sets[0] == "portable"


@pytest.mark.skipif(cpu.reason_absent() is not None, reason="C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_it_on_a_cpu(dtype):
    for codec in ("plain", "fp8", "int8", "int4"):
        case = Case("mla_decode", "cpu", dtype, codec)
        assert resolve("auto", case).name == "cpp" and resolve("cpp", case).name == "cpp"


def test_it_says_why_it_cannot_run():
    def reason(**case):
        return dict(supported_impls("mla_decode", **case))["cpp"]

    assert "needs float32, bfloat16 or float16, got torch.float64" in reason(dtype=torch.float64)
    assert reason(device="cuda") == "needs a CPU, got cuda"


def test_the_package_is_complete_without_it():
    """A process in which `mla._C` does not exist decodes by plain PyTorch and says so."""
    code = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name == "mla._C" else find_spec(name, *rest)
)
import torch
from mla.kernels import cpu
from mla.ops import mla_decode, supported_impls
from mla.view import CacheView

assert "was not built" in cpu.reason_absent(), cpu.reason_absent()
assert ("cpp", cpu.reason_absent()) in supported_impls("mla_decode")
view = CacheView.dense(torch.ones(1, 3, 7), torch.tensor([3], dtype=torch.int32), C=5, R=2)
out = mla_decode(torch.ones(1, 1, 2, 5), torch.ones(1, 1, 2, 2), view, scale=1.0).out
assert torch.equal(out, torch.ones_like(out))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_only_one_file_binds_and_none_but_it_knows_python():
    sources = {path.name: path.read_text() for path in (ROOT / "csrc").iterdir()}
    assert [name for name, text in sources.items() if "Python.h" in text] == ["library.cpp"]
    assert [name for name, text in sources.items() if "STABLE_TORCH_LIBRARY" in text] == [
        "library.cpp"
    ]
    assert not [name for name, text in sources.items() if "ATen/" in text or "torch/all.h" in text]
