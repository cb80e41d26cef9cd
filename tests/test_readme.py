"""The README keeps its word: its Python runs, its commands exist, its links lead somewhere.

Python blocks under one `##` heading share a namespace and run in order, in an empty folder. Where
they speak of `.cache/mla` it is there, and holds what `make data` prepares.
"""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (language, text) of the fenced blocks under it, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^(?=## )", page, flags=re.MULTILINE):
        heading = part.splitlines()[0].lstrip("# ") if part.strip() else ""
        found[heading] = _FENCED.findall(part)
    return found


def blocks(language: str, *pages: Path) -> list[tuple[str, str]]:
    """(page and heading, text) of every block in ``language``."""
    return [
        (f"{page.name}: {heading}", text)
        for page in pages
        for heading, fenced in sections(page.read_text(encoding="utf-8")).items()
        for found, text in fenced
        if found == language
    ]


def python_sections() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for heading, text in blocks("python", ROOT / "README.md"):
        found.setdefault(heading, []).append(text)
    return found


PYTHON_SECTIONS = python_sections()
COMMANDS = [
    pytest.param(line, id=line)
    for _, text in blocks("bash", *PAGES)
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("heading", PYTHON_SECTIONS)
def test_python_runs(heading, request, tmp_path, monkeypatch):
    source = "\n".join(PYTHON_SECTIONS[heading])
    if ".cache/mla" in source:
        model = request.getfixturevalue("data_paths").model
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "mla").symlink_to(model.resolve().parent)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__readme__"}
    for number, text in enumerate(PYTHON_SECTIONS[heading]):
        exec(compile(text, f"{heading}, block {number}", "exec"), namespace)


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = (line for line in makefile.splitlines() if line.startswith(".PHONY:"))
    return set(line.split()[1:])


def command_error(line: str) -> str | None:
    """Why a documented command cannot be right, or None."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["make"]:
        unknown = {word for word in words[1:] if "=" not in word} - make_targets()
        return f"make has no target {sorted(unknown)}" if unknown else None
    if words[1:3] == ["-m", "mla"]:
        from mla.__main__ import build_parser

        try:
            build_parser().parse_args(words[3:])
        except SystemExit as stop:
            return f"mla does not take {words[3:]}" if stop.code else None
        return None
    if words[:1] == [".venv/bin/torchrun"]:
        file = next((word for word in words if word.endswith(".py")), "")
        return None if file and (ROOT / file).exists() else f"no file {file}"
    if words[:1] in (["python"], [".venv/bin/python"]):
        script = words[3] if words[1:3] == ["-m", "pytest"] and len(words) > 3 else words[1]
        file = script.partition("::")[0]
        return None if (ROOT / file).exists() or file.startswith("-") else f"no file {file}"
    if words[:2] == ["pip", "install"]:
        asked = re.findall(r"\[([\w,]+)\]", line)
        extras = {name for group in asked for name in group.split(",")}
        unknown = extras - {"triton", "transformers", "bench", "dev"}
        return f"unknown extras {sorted(unknown)}" if unknown else None
    return None if words[:1] in (["git"], ["cd"]) else "a kind of command that no test knows"


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    assert not command_error(line)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "python -m mla nothing",
        "rm -rf /",
        ".venv/bin/torchrun x.py",
        "pip install .[nothing]",
    ],
)
def test_a_wrong_command_is_seen(line):
    assert command_error(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing
