"""The data tool makes whole folders or none, and the cleaner leaves words and drops mark-up."""

import bz2
import hashlib
import json
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools import data, gguf_model, wikitext
from tools.data import DataError, Member


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[philosophy|way of thought]] of [[Greece]]", "a way of thought of Greece"),
        ("see [[File:x.png|thumb|a [[nested]] caption]]this", "see this"),
        ("x[[Category:Things]] y", "x y"),
        ("one<ref name=a>[http://a.b c]</ref> two<ref name=a/> three", "one two three"),
        ("1{{cite|{{nested}}}}2", "12"),
        ("about {{convert|5|km|mi}} away", "about 5 km away"),
        ("{{lang|de|Wort}} (, or ) is", "Wort is"),
        ("before\n{|class=x\n|cell {|inner|}\n|}\nafter", "before\n\nafter"),
        ("== History ==\n* first\n# second", "History\n\nfirst\n\nsecond"),
        ("A &amp; B<br/>C<!-- no -->", "A & BC"),
        ("text\n== See also ==\n* [[other]]", "text"),
        ("on [http://a.b the web] and [http://a.b]", "on the web and"),
        ("unclosed {{template", "unclosed {{template"),
    ],
)
def test_clean_keeps_words_and_drops_mark_up(source, text):
    assert wikitext.clean(source) == text


@given(st.text(alphabet="{}[]|<>='ab \n/ref!-", max_size=60))
def test_clean_ends_on_any_mark_up(source):
    assert "{{" not in wikitext.clean(source) or "{{" in source


def test_articles_skips_redirects_other_namespaces_and_short_ones(tmp_path):
    def page(title: str, ns: int, text: str, extra: str = "") -> str:
        revision = f"<revision><text>{text}</text></revision>"
        return f"<page><title>{title}</title><ns>{ns}</ns>{extra}{revision}</page>"

    pages = page("Long", 0, "word " * 20) + page("Short", 0, "word")
    pages += page("Talk", 1, "word " * 20) + page("Gone", 0, "word " * 20, "<redirect/>")
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(f'<mediawiki xmlns="http://m/">{pages}</mediawiki>'.encode()))
    found = list(wikitext.articles(dump, min_characters=50))
    assert found == ["Long\n\n" + ("word " * 20).strip()]


@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 5),
    width=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_half_split_rows_undoes_the_interleaving(heads, half, width, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads * 2 * half, width, generator=rng)
    interleaved = weight.view(heads, 2, half, width).transpose(1, 2).reshape_as(weight)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(gguf_model.half_split_rows(name, interleaved, 2 * half), weight)
    assert gguf_model.half_split_rows("v_proj.weight", weight, 2 * half) is weight


@pytest.fixture
def member(tmp_path, monkeypatch):
    """A wheel on disk in place of a download, and what it should hold."""
    content = b"the content"
    downloads = tmp_path / "downloads"
    downloads.mkdir()

    def download(member: Member, folder: object) -> object:
        wheel = downloads / "thing-1.0.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("thing/file.bin", content)
        return wheel

    monkeypatch.setattr(data, "_download", download)
    return Member("thing==1.0", "thing/file.bin", hashlib.sha256(content).hexdigest(), "none")


def copy_member(source, folder):
    (folder / "out.bin").write_bytes(source.read_bytes())


def test_a_folder_is_made_once_and_recognised(tmp_path, member):
    folder = tmp_path / "made"
    assert not data._is_complete(folder, member)
    data._make_folder(folder, member, copy_member)
    assert (folder / "out.bin").read_bytes() == b"the content"
    assert data._is_complete(folder, member)
    assert not data._is_complete(folder, member._replace(requirement="thing==2.0"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "made"]


def test_an_older_folder_is_replaced(tmp_path, member):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "SOURCE.json").write_text(json.dumps({"layout_version": 0}))
    (folder / "stale").write_text("x")
    data._make_folder(folder, member, copy_member)
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE.json", "out.bin"]


def test_a_wrong_hash_leaves_no_folder_and_no_wheel(tmp_path, member):
    wrong = member._replace(sha256="0" * 64)
    with pytest.raises(DataError, match=r"thing/file.bin has sha256 .* expected 0{64}"):
        data._make_folder(tmp_path / "made", wrong, copy_member)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    assert not list((tmp_path / "downloads").iterdir())


def test_a_writer_that_fails_leaves_nothing(tmp_path, member):
    def fail(source, folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data._make_folder(tmp_path / "made", member, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_a_missing_member_is_one_clear_error(tmp_path, member):
    with pytest.raises(DataError, match="cannot be read"):
        data._make_folder(tmp_path / "made", member._replace(path="thing/no.bin"), copy_member)


def test_no_data_is_none(tmp_path):
    assert data.find_data(tmp_path) is None


def test_the_real_text_is_split_and_clean(data_paths):
    calibration = data.read_articles(data_paths.calibration_text)
    evaluation = data.read_articles(data_paths.evaluation_text)
    assert len(calibration) == 68
    assert len(evaluation) == 23
    assert not set(calibration) & set(evaluation)
    assert all(len(article) > data.MIN_ARTICLE_CHARACTERS for article in calibration + evaluation)
    joined = "".join(calibration + evaluation)
    assert not any(mark in joined for mark in ("{{", "}}", "<ref", "'''"))


@pytest.mark.slow
def test_the_real_model_continues_a_sentence(smollm2, smollm2_tokenizer):
    ids = smollm2_tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        next_id = smollm2(ids).logits[0, -1].argmax()
    assert smollm2_tokenizer.decode(next_id) == " Paris"
