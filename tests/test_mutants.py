"""The list of breaks fits the code, and the tool that tries them tells caught from missed."""

import ast
from pathlib import Path

import pytest
from mutants import MUTANTS

from tools.mutants import COPIED, Mutant, MutantError, apply

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_break_fits_the_code(mutant, tmp_path):
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_bytes((ROOT / mutant.file).read_bytes())
    apply(mutant, tmp_path)
    assert copy.read_bytes() != (ROOT / mutant.file).read_bytes(), "the broken line is the original"
    if copy.suffix == ".py":
        ast.parse(copy.read_text(encoding="utf-8"))  # broken, but still Python


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_break_names_tests_that_exist(mutant):
    assert mutant.tests
    for test in mutant.tests:
        file, *names = test.partition("[")[0].split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in ast.walk(tree)}
        assert set(names) <= defined, f"{test} is not in {file}"


def test_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))


def test_tests_lie_where_they_are_copied_from():
    assert {mutant.file.split("/")[0] for mutant in MUTANTS} <= set(COPIED)


def test_apply_keeps_the_indentation(tmp_path):
    (tmp_path / "code.py").write_text("def f(x):\n    return x + 1\n")
    apply(Mutant("plus", "code.py", "return x + 1", "return x - 1", ("t",)), tmp_path)
    assert (tmp_path / "code.py").read_text() == "def f(x):\n    return x - 1\n"


@pytest.mark.parametrize(("source", "count"), [("a = 1\n", 0), ("x = 1\nif a:\n    x = 1\n", 2)])
def test_a_line_that_does_not_occur_once_is_an_error(tmp_path, source, count):
    (tmp_path / "code.py").write_text(source)
    with pytest.raises(MutantError, match=f"occurs {count} times in code.py, expected once: x = 1"):
        apply(Mutant("x", "code.py", "x = 1", "x = 2", ("t",)), tmp_path)
    assert (tmp_path / "code.py").read_text() == source
