"""Build the C++ kernels of `csrc/` where that is possible; otherwise install pure Python.

Everything else about the package is in pyproject.toml. The extension needs torch at build time, so
an isolated build (`pip install .`), which has none, gives a complete package without it; `make env`
or `pip install --no-build-isolation .` builds it.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the package admits
PYTHON_LIMITED_API = "0x030a0000"  # 3.10


def reason_not_to_build(sources: list[str]) -> str | None:
    """Why the extension cannot be built here, or None."""
    if not sources:
        return "this version has no C++ kernels"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found; on Debian or Ubuntu: sudo apt install g++"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported here ({error}); install with --no-build-isolation"
    return None


def extension_arguments(sources: list[str]) -> dict[str, Any]:
    """`setup` arguments of a stable-ABI extension, one for all Pythons and torches we admit."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"]
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")  # without it torch's parallel_for runs serially, silently
    extension = CppExtension(
        "mla._C",
        sources,
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("Py_LIMITED_API", PYTHON_LIMITED_API),
        ],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp"] if sys.platform.startswith("linux") else [],
        depends=sorted(str(header) for header in Path("csrc").glob("*.h")),
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
reason = reason_not_to_build(sources)
print(f"mla: {'building the C++ kernels' if reason is None else f'pure Python, {reason}'}")
setup(**(extension_arguments(sources) if reason is None else {}))
