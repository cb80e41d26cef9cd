"""The tree of an older version, complete enough to run today's benchmarks."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

WITHOUT = shutil.ignore_patterns("__pycache__", "results", "figures")


class TreeError(ValueError):
    """The version cannot be had or built; the message is one line."""


def resolve(ref: str, root: Path) -> str:
    """The commit that ``ref`` names."""
    done = _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if done.returncode:
        raise TreeError(f"{ref!r} is no version that git knows in {root}")
    return done.stdout.strip()


def export(ref: str, root: Path, folder: Path) -> str:
    """Put version ``ref`` into ``folder``; returns what its C++ kernels are.

    The package and `csrc` are of that version, the benchmarks those of ``root``, so that cases and
    inputs are the same. The kernels are built only where their sources differ. What is ignored by
    git, the model and the demo's output, is shared.
    """
    archive = folder.with_suffix(".zip")
    done = _git(root, "archive", "--format=zip", "-o", str(archive), resolve(ref, root))
    if done.returncode:
        raise TreeError(f"git archive failed: {done.stderr.strip()}")
    shutil.unpack_archive(archive, folder)
    archive.unlink()
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    shutil.copytree(root / "benchmarks", folder / "benchmarks", ignore=WITHOUT)
    for name in (".cache", "out"):
        if (root / name).is_dir():
            (folder / name).symlink_to(root / name)
    return _extension(root, folder)


def _extension(root: Path, folder: Path) -> str:
    built = list((root / "mla").glob("_C*"))
    if not built:
        return "no C++ kernels: they are not built here"
    if not (folder / "csrc").is_dir():
        return "no C++ kernels: that version has none"
    if same_sources(root, folder):
        for path in built:
            shutil.copy2(path, folder / "mla")
        return "the same C++ kernels"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not list((folder / "mla").glob("_C*")):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TreeError(f"its C++ kernels cannot be built: {last[0]}")
    return "its own C++ kernels, built now"


def same_sources(root: Path, other: Path) -> bool:
    """Whether both would build the same extension."""
    files = [
        {path.relative_to(tree) for path in [*tree.glob("csrc/*"), tree / "setup.py"]}
        for tree in (root, other)
    ]
    return files[0] == files[1] and all(
        filecmp.cmp(root / path, other / path, shallow=False) for path in files[0]
    )


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise TreeError(f"git cannot be run: {error}") from None
