"""Imports inside `mla/` against the table of layers; `import mla` stays lean; files stay small.

A module may import the layers below its own and, inside its layer, only what its entry names. A new
module is added here with its layer, so that the place of everything is written down once.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mla"

# From the bottom up: module or package -> what it may import inside its own layer. A package named
# here is one unit, whose files import each other freely, unless its files are named themselves. So
# is a family of kernels: `kernels.prefill` is `kernels/prefill.py` and `kernels/prefill_*.py`.
LAYERS: list[dict[str, set[str]]] = [
    {"checks": set(), "presets": {"checks"}, "config": {"checks", "presets"}},
    {
        "rope": set(),
        "absorb": set(),
        "codec": set(),
        "view": {"codec"},
        "plan": {"codec"},
        "reference": set(),
    },
    {
        "kernels.tiles": set(),
        "kernels.launch": set(),
        "kernels.merge": {"kernels.tiles", "kernels.launch"},
        "kernels.append": {"kernels.tiles", "kernels.launch"},
        "kernels.expand": {"kernels.tiles", "kernels.launch"},
        "kernels.rotate": {"kernels.tiles", "kernels.launch"},
        "kernels.decode": {"kernels.tiles", "kernels.launch", "kernels.merge", "kernels.rotate"},
        "kernels.prefill_types": set(),
        "kernels.variant_types": set(),
        "kernels.prefill": {
            *("kernels.launch", "kernels.expand", "kernels.prefill_types"),
            "kernels.variant_types",
        },
        "kernels.variants": {
            *("kernels.launch", "kernels.merge", "kernels.append", "kernels.rotate"),
            *("kernels.expand", "kernels.decode", "kernels.prefill", "kernels.variant_types"),
        },
        "kernels.eager": {"kernels.prefill_types"},
        "kernels.cpu": set(),
        "kernels": set(),
    },
    {
        "ops.library": set(),
        "ops.select": set(),
        "ops.decode": {"ops.library", "ops.select"},
        "ops.prefill": {"ops.library", "ops.select", "ops.decode"},
        "ops.append": {"ops.library", "ops.select", "ops.decode"},
        "ops.merge": {"ops.library", "ops.select", "ops.decode"},
        "ops": {"ops.decode", "ops.prefill", "ops.append", "ops.merge", "ops.select"},
    },
    {
        "cache.base": set(),
        "cache.dense": {"cache.base"},
        "cache.pages": set(),
        "cache.prefix": set(),
        "cache.batch": {"cache.base", "cache.prefix", "cache.paged"},  # of cache.paged its type
        "cache.paged": {"cache.base", "cache.batch", "cache.pages", "cache.prefix"},
        "cache.stored": {"cache.base", "cache.dense", "cache.paged", "cache.prefix"},
        "cache.files": {"cache.dense", "cache.paged", "cache.stored"},
        "cache": {"cache.base", "cache.batch", "cache.dense", "cache.paged", "cache.files"},
    },
    {"padding": set(), "module": {"padding"}},
    {"convert": set(), "parallel": set(), "integrations": {"convert"}},
    {"cli": set(), "__main__": {"cli"}},
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
OPEN = {unit.rpartition(".")[0] for unit in RANK} - {
    ""
}  # packages whose files are named one by one
TOP_RANK = len(LAYERS) - 1

# What may be imported when a module is loaded, besides torch, einops and the standard library.
# Everything else is imported inside the function that needs it.
THIRD_PARTY: dict[str, set[str]] = {
    **{unit: {"triton"} for unit in RANK if unit.startswith("kernels.")},
    "kernels.prefill_types": set(),
    "kernels.eager": set(),
    "kernels.cpu": set(),
    "convert": {"rich", "safetensors", "transformers"},
    "integrations": {"transformers", "vllm"},
    "cli": {"rich"},
    "__main__": {"rich"},
}


class Import(NamedTuple):
    """One import statement: where it is, what it names, whether it runs when the file is loaded."""

    line: int
    target: str
    is_at_load: bool


def unit_of(module: str) -> str:
    """The entry of the table that ``module``, named from below `mla`, belongs to."""
    if module in RANK:
        return module
    if module.startswith("kernels."):
        family = module.partition("_")[0]
        if family in RANK:
            return family
    parts = module.split(".")
    units = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((unit for unit in units if unit in RANK and unit not in OPEN), "")


def module_name(path: Path) -> str:
    """`mla/ops/decode.py` -> `ops.decode`; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in ``tree``, absolute, those in functions included."""
    in_functions = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    in_functions |= {  # never run
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        is_at_load = node not in in_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, is_at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["mla", *filter(None, module.split("."))]
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_ours = base == "mla" or base.startswith("mla.")
                is_submodule = is_ours and is_module(inner.removeprefix("mla."))
                yield Import(node.lineno, inner if is_submodule else base, is_at_load)


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    unit = unit_of(module)
    if module and not unit:
        return [f"mla.{module} has no layer, expected an entry in LAYERS"]
    found = []
    for line, target, is_at_load in imports_of(ast.parse(source), module, is_package=is_package):
        top, _, inner = target.partition(".")
        if top != "mla":
            allowed = {"torch", "einops", *sys.stdlib_module_names, *THIRD_PARTY.get(unit, set())}
            if is_at_load and top not in allowed:
                found.append(f"line {line}: imports {top} when it is loaded")
            continue
        other = unit_of(inner)
        if inner and not other:
            found.append(f"line {line}: imports mla.{inner}, which has no layer")
        elif not module:  # the package itself: names of the first five layers, the others on demand
            if is_at_load and RANK[other] > RANK["module"]:
                found.append(f"line {line}: imports mla.{inner} when it is loaded")
        elif not inner:
            if RANK[unit] < TOP_RANK:
                found.append(f"line {line}: imports the package mla, expected one of its modules")
        elif other == "reference" and RANK[unit] < TOP_RANK:
            found.append(f"line {line}: imports the oracle mla.reference")
        elif unit == "reference":
            found.append(
                f"line {line}: imports mla.{inner}, expected nothing of ours in the oracle"
            )
        elif other != unit and RANK[other] == RANK[unit] and other not in LAYERS[RANK[unit]][unit]:
            found.append(f"line {line}: mla.{unit} has no arrow to mla.{other} inside their layer")
        elif RANK[other] > RANK[unit]:
            found.append(f"line {line}: imports mla.{other} from a layer above mla.{unit}")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    source = path.read_text(encoding="utf-8")
    found = complaints(source, module_name(path), is_package=path.name == "__init__.py")
    assert not found, f"{path.relative_to(ROOT)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("codec", "from mla.view import CacheView", "no arrow to mla.view"),
        ("rope", "from mla.ops import mla_decode", "from a layer above mla.rope"),
        ("view", "from . import module", "from a layer above mla.view"),
        ("ops.decode", "def f():\n    from mla import reference", "imports the oracle"),
        ("reference", "from mla.checks import ShapeError", "nothing of ours in the oracle"),
        ("module", "import mla", "imports the package mla"),
        ("module", "import numpy as np", "imports numpy when it is loaded"),
        ("module", "try:\n    import triton\nexcept ImportError:\n    pass", "imports triton"),
        ("", "from mla.convert import gqa_to_mla", "imports mla.convert when it is loaded"),
        ("surprise", "import torch", "no layer"),
        ("kernels.surprise", "import torch", "no layer"),
        (
            "kernels.prefill_keys",
            "from mla.kernels import decode",
            "no arrow to mla.kernels.decode",
        ),
    ],
)
def test_a_wrong_import_is_seen(module, source, complaint):
    assert any(complaint in line for line in complaints(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("view", "from mla.codec import Codec"),
        ("ops.decode", "from ..kernels.eager import decode\nfrom . import library"),
        ("integrations.transformers.replace", "from mla.convert import x\nimport transformers"),
        ("cache.dense", "def f():\n    import numpy"),
        ("", "def __getattr__(name):\n    from mla import convert"),
    ],
)
def test_a_right_import_passes(module, source):
    assert complaints(source, module) == []


def test_import_mla_needs_torch_and_einops_only():
    code = """
import sys
import torch
before = set(sys.modules)
import mla
heavy = {"triton", "transformers", "matplotlib", "rich", "safetensors", "scipy", "pandas", "peft"}
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not heavy & loaded, sorted(heavy & loaded)
assert "torch._inductor" not in set(sys.modules) - before, "torch._inductor"
assert "torch._dynamo" not in set(sys.modules) - before, "torch._dynamo"
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


FOLDERS = ("mla", "csrc", "tests", "tools", "benchmarks", "examples")
CODE = {".py", ".sh", ".cpp", ".h"}


def own_files() -> list[Path]:
    """Code and pages of the repository."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    code = [path for path in inside if path.suffix in CODE]
    return sorted([*code, *ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.toml")])


def test_files_are_short():
    lengths = {path: len(path.read_bytes().splitlines()) for path in own_files()}
    long = [f"{path.relative_to(ROOT)}: {count}" for path, count in lengths.items() if count >= 400]
    long = [line for line in long if not line.startswith(("README", "CHANGELOG"))]
    assert not long, f"files of 400 lines or more: {long}"


def test_files_are_ascii():
    odd = [str(path.relative_to(ROOT)) for path in own_files() if not path.read_bytes().isascii()]
    assert not odd, f"files with characters outside ASCII: {odd}"
