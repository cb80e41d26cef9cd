"""Break the code one line at a time and require the tests to notice. Run by `make mutants`.

Each entry of `tests/mutants.py` names a line, what to put in its place and the tests that guard it.
The unbroken copy of the tree must pass all those tests; then each break is made in a copy of its
own, which must fail at least one of the tests named for it. A break that goes unnoticed is a hole
in the tests.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mla", "tests", "tools", "benchmarks", "examples", "csrc")
COPIED = (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE")
TIMEOUT = 600  # seconds for the tests of one break
PASSED, FAILED = 0, 1  # pytest's exit codes; most others mean that the tests did not run
TIMED_OUT = 1000


class Mutant(NamedTuple):
    """One break: ``broken`` replaces ``original``, a line of ``file`` without its indentation.

    ``tests`` are the pytest node ids of which at least one must fail; ``interpreter``: they run in
    Triton's interpreter, which is chosen for a whole process.
    """

    name: str
    file: str
    original: str
    broken: str
    tests: tuple[str, ...]
    interpreter: bool = False


class MutantError(ValueError):
    """An entry of the list does not fit the code; the message is one line."""


def load_mutants(path: Path) -> list[Mutant]:
    """The list kept in ``path``."""
    spec = importlib.util.spec_from_file_location("mutants_list", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # the list may be cut into several files
    spec.loader.exec_module(module)
    mutants: list[Mutant] = module.MUTANTS
    return mutants


def apply(mutant: Mutant, root: Path) -> None:
    """Replace the one line of ``mutant`` in the tree at ``root``, in place.

    Raises:
        MutantError: the original line does not occur exactly once.
    """
    path = root / mutant.file
    if not path.is_file():
        raise MutantError(f"{mutant.name}: {mutant.file} does not exist")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [index for index, line in enumerate(lines) if line.strip() == mutant.original]
    if len(places) != 1:
        raise MutantError(
            f"{mutant.name}: the original line occurs {len(places)} times in {mutant.file}, "
            f"expected once: {mutant.original}"
        )
    line = lines[places[0]]
    indentation = line[: len(line) - len(line.lstrip())]
    lines[places[0]] = f"{indentation}{mutant.broken}\n"
    path.write_text("".join(lines), encoding="utf-8")


def copy_tree(target: Path) -> None:
    """Copy what the tests need to ``target``; the data is linked."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target / name)


def is_compiled(mutant: Mutant) -> bool:
    return mutant.file.startswith("csrc/")


def build(root: Path) -> str | None:
    """Build the extension of the tree at ``root``; what the compiler said if that failed."""
    for old in (root / "mla").glob("_C.*"):
        old.unlink()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
    is_built = any((root / "mla").glob("_C.*"))
    return None if is_built else result.stdout + result.stderr


def run_tests(
    root: Path, tests: Iterable[str], data_root: Path, interpreter: bool = False
) -> tuple[int, str]:
    """pytest's exit code and output for ``tests`` in the tree at ``root``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--durations", "0"]
    command += ["-p", "no:cacheprovider", "--hypothesis-profile=ci"]
    # With "=": pytest would take a separate value for a test folder and find its root by it.
    command += [f"--data-root={data_root}", *sorted(set(tests))]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = str(int(interpreter))
    try:
        result = subprocess.run(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"no result after {TIMEOUT} s"
    return result.returncode, result.stdout + result.stderr


def judge(mutant: Mutant, data_root: Path) -> tuple[Mutant, str, str]:
    """Break a copy and run its tests: (mutant, "caught" | "missed" | "error", output)."""
    with tempfile.TemporaryDirectory(prefix="mla-mutant-") as folder:
        copy_tree(Path(folder))
        apply(mutant, Path(folder))
        if is_compiled(mutant) and (output := build(Path(folder))) is not None:
            return mutant, "error", output
        code, output = run_tests(Path(folder), mutant.tests, data_root, mutant.interpreter)
    # Below 0: a signal ended the tests, as a wild read does.
    verdict = "caught" if code < 0 else {PASSED: "missed", FAILED: "caught"}.get(code, "error")
    return mutant, verdict, output


def check_unbroken(mutants: Sequence[Mutant], data_root: Path) -> str | None:
    """The output of the named tests in an unbroken copy if they do not pass, else None."""
    with tempfile.TemporaryDirectory(prefix="mla-mutant-") as folder:
        copy_tree(Path(folder))
        for interpreter in (False, True):
            chosen = [mutant for mutant in mutants if mutant.interpreter == interpreter]
            tests = [test for mutant in chosen for test in mutant.tests]
            if not tests:
                continue
            code, output = run_tests(Path(folder), tests, data_root, interpreter)
            if code != PASSED:
                return output
    return None


def main() -> int:
    """Run all breaks, or those given by name, and print how many were caught."""
    parser = argparse.ArgumentParser(description="Break the code; the tests must notice.")
    parser.add_argument("--only", action="append", metavar="NAME", help="run just this break")
    parser.add_argument("--list", type=Path, default=ROOT / "tests" / "mutants.py")
    parser.add_argument("--data-root", type=Path, default=ROOT / ".cache" / "mla")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    mutants = load_mutants(arguments.list)
    if unknown := set(arguments.only or ()) - {mutant.name for mutant in mutants}:
        print(f"mutants: failed: no break is named {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    mutants = [m for m in mutants if not arguments.only or m.name in arguments.only]
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        print("mutants: those of csrc are left out, there is no C++ compiler")
        mutants = [m for m in mutants if not is_compiled(m)]
    data_root = arguments.data_root.resolve()
    output = check_unbroken(mutants, data_root) if mutants else None
    if output is not None:
        print(output)
        print("mutants: failed: the unbroken code does not pass the named tests", file=sys.stderr)
        return 1

    verdicts = []
    try:
        with ThreadPoolExecutor(arguments.workers) as pool:
            for mutant, verdict, output in pool.map(lambda m: judge(m, data_root), mutants):
                print(f"{verdict:7} {mutant.name}: {mutant.file}: {mutant.broken}", flush=True)
                if verdict == "error":
                    print(output)
                verdicts.append(verdict)
    except MutantError as error:
        print(f"mutants: failed: {error}", file=sys.stderr)
        return 1
    caught = verdicts.count("caught")
    print(f"mutants: {caught} of {len(mutants)} caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
