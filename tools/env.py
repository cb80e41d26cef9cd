"""Make `.venv` with the pinned versions and this package in it; do nothing when it is up to date.

Run by `make env` through env.sh, with any Python 3.10 or newer and only its standard library.
A stamp inside `.venv` holds a hash of everything the environment is made from, so a second call
returns at once and a failed one is taken up again.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mla-environment"
LOG = ROOT / ".cache" / "env.log"
EXTRAS = "dev,bench,transformers,triton"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class SetupError(RuntimeError):
    """The environment cannot be made; the message is one line that says what to do."""


def content_hash() -> str:
    """Hash of the Python version and of every file that decides what is installed and built."""
    files = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "setup.py")]
    files += sorted((ROOT / "csrc").rglob("*")) if (ROOT / "csrc").is_dir() else []
    digest = hashlib.sha256(f"{PYTHON} {ROOT} {shutil.which(compiler())}".encode())
    for path in files:
        if path.is_file():
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compiler() -> str:
    """The C++ compiler that setup.py will use."""
    return shlex.split(os.environ.get("CXX", "c++"))[0]


def extension_status() -> str:
    """Whether the C++ kernels are there, and what is missing if not."""
    if not list((ROOT / "csrc").glob("*.cpp")):
        return "no C++ kernels in this version"
    if list((ROOT / "mla").glob("_C.*")):
        return "C++ kernels built"
    return f"C++ kernels not built, no compiler ({compiler()}): sudo apt install g++, then make env"


def run(what: str, *command: str) -> None:
    """Run one step, its output in the log; on failure show the log's end and raise."""
    print(f"env: {what} ...", flush=True)
    start = time.monotonic()
    with LOG.open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        status = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if status != 0:
        print("\n".join(LOG.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
        raise SetupError(f"{what} failed; the whole output is in {LOG.relative_to(ROOT)}")
    print(f"env: {what} took {time.monotonic() - start:.0f} s", flush=True)


def make_venv() -> None:
    """Make `.venv`, or keep one that already has this version of Python."""
    if VENV_PYTHON.exists():
        code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
        result = subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True)
        found = result.stdout.strip() or "without pip, or broken"
        if found == PYTHON:
            return
        print(f"env: .venv has Python {found}; making it anew with {PYTHON}")
    if VENV.exists():
        shutil.rmtree(VENV)
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"Python {PYTHON} has no {' and no '.join(missing)} module; "
            f"run: sudo apt install python{PYTHON}-venv"
        )
    run(f"making .venv with Python {PYTHON}", sys.executable, "-m", "venv", str(VENV))


def install() -> None:
    """Install torch, then the rest and this package, all at the versions of constraints.txt."""
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--constraint", "constraints.txt"]
    # torch comes first and alone: the build of the package needs it, and TORCH_PIP_ARGS can say
    # which build of it to take, for example the smaller one without CUDA.
    torch_arguments = shlex.split(os.environ.get("TORCH_PIP_ARGS", ""))
    for stale in (ROOT / "mla").glob("_C.*"):  # without a compiler it would stay and be loaded
        stale.unlink()
    run("installing torch", *pip, *torch_arguments, "torch", "setuptools")
    run("installing tools and mla", *pip, "--no-build-isolation", "--editable", f".[{EXTRAS}]")


def main() -> int:
    """Bring `.venv` up to date and print one line about it."""
    stamp = content_hash()
    try:
        if not STAMP.exists() or STAMP.read_text() != stamp:
            LOG.parent.mkdir(exist_ok=True)
            LOG.write_text("")
            make_venv()
            STAMP.unlink(missing_ok=True)
            install()
            STAMP.write_text(stamp)
    except (SetupError, OSError) as error:
        print(f"env: failed: {error}", file=sys.stderr)
        return 1
    print(f"env: ready (.venv, Python {PYTHON}; {extension_status()})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
