"""Triton kernels: the same tests on a GPU and, with TRITON_INTERPRET=1, in the interpreter.

The interpreter must be chosen before triton is imported and excludes compiling, so it has a pytest
process of its own: ``TRITON_INTERPRET=1 pytest tests/kernels``. Tests marked both ``compiles`` and
``slow``, a quarter of an hour of compiling, run only where ``-m`` or the thorough profile asks.
"""

import os

import pytest
import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/kernels/" in item.path.as_posix()]
    everything = config.option.markexpr or config.getoption("--hypothesis-profile") == "thorough"
    left_out = []
    for item in here:
        if item.get_closest_marker("compiles"):
            if item.get_closest_marker("slow") and not everything:
                left_out.append(item)
            elif IS_INTERPRETING:
                item.add_marker(pytest.mark.skip(reason="the interpreter cannot compile"))
        elif not torch.cuda.is_available() and not IS_INTERPRETING:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device (TRITON_INTERPRET=1 runs these on a CPU)")
            )
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
