"""Build the C++ kernels of `csrc/` where that is possible; otherwise install pure Python.

Everything else about the package is in pyproject.toml. The extension needs torch at build time, so
an isolated build (`pip install .`), which has none, gives a complete package without it; `make env`
or `pip install --no-build-isolation .` builds it.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the package admits

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# One file for each instruction set, chosen at run time: no other file may have its flags.
FLAGS_OF_FILES: dict[str, list[str]] = {
    "decode_avx2.cpp": AVX2_FLAGS,
    "decode_avx512.cpp": AVX512_FLAGS,
    "decode_avx512bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "decode_avx512vnni.cpp": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


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

    class BuildKernels(BuildExtension):  # type: ignore[misc]
        """Adds the flags of each file; torch's own class wraps what it finds here."""

        def build_extensions(self) -> None:
            compile_one = self.compiler._compile

            def compile_with_flags(
                obj: str, source: str, ext: str, cc_args: Any, extra: list[str], pp_opts: Any
            ) -> None:
                own = FLAGS_OF_FILES.get(Path(source).name, [])
                compile_one(obj, source, ext, cc_args, [*extra, *own], pp_opts)

            self.compiler._compile = compile_with_flags
            super().build_extensions()

    # GCC 12 warns of uninitialised values inside its own AVX-512 headers.
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall"]
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", "-g0"]
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")  # without it torch's parallel_for runs serially, silently
    extension = CppExtension(
        "mla._C",
        sources,
        py_limited_api=True,  # defines Py_LIMITED_API for 3.10, torch's oldest Python
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp"] if sys.platform.startswith("linux") else [],
        optional=True,  # where it does not compile the package is still complete
        depends=sorted(str(header) for header in Path("csrc").glob("*.h")),
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


sources = sorted(
    str(path) for path in Path("csrc").glob("*.cpp") if IS_X86 or path.name not in FLAGS_OF_FILES
)
reason = reason_not_to_build(sources)
print(f"mla: {'building the C++ kernels' if reason is None else f'pure Python, {reason}'}")
setup(**(extension_arguments(sources) if reason is None else {}))
