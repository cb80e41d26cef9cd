"""What a wheel of the package holds, what it asks for, and that it works where it is installed."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure Python wheel, built from a copy so that the tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "_C.*")
    for name in ("mla", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", target, ".", cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_without_kernels_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_package_itself_asks_for_torch_and_einops_only(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["einops", "torch>=2.10"]


def test_the_extras_are_the_promised_ones(metadata):
    assert set(metadata.get_all("Provides-Extra")) == {"triton", "transformers", "bench", "dev"}
    assert "transformers>=5.15; extra" in " ".join(metadata.get_all("Requires-Dist"))


def test_version_and_python(metadata):
    import mla

    assert metadata["Version"] == mla.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_build_does_not_ask_for_torch():
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("requires = "))
    assert "torch" not in line.partition("#")[0]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {name.partition("/")[0] for name in names}
    assert folders - {"mla"} == {name for name in folders if name.endswith(".dist-info")}
    assert "mla/py.typed" in names
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "mla").rglob("*.py")}
    assert here == {name for name in names if name.endswith(".py")}


def test_the_installed_wheel_imports(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    code = "import mla; print(mla.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert printed.strip() == str(site / "mla" / "__init__.py")
