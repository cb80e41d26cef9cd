"""Triton kernels: the same tests on a GPU and, with TRITON_INTERPRET=1, in the interpreter.

The interpreter must be chosen before triton is imported and excludes compiling, so it has a pytest
process of its own: ``TRITON_INTERPRET=1 pytest tests/kernels``.
"""

import os

import pytest
import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/kernels/" in item.path.as_posix()]
    for item in here:
        if item.get_closest_marker("compiles"):
            if IS_INTERPRETING:
                item.add_marker(pytest.mark.skip(reason="the interpreter cannot compile"))
        elif not torch.cuda.is_available() and not IS_INTERPRETING:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device (TRITON_INTERPRET=1 runs these on a CPU)")
            )
