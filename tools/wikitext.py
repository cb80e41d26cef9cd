"""Wikipedia mark-up to plain text, far enough for measuring perplexity on prose.

A modest cleaner: it drops templates, tables, references, comments, files and the lists of links
that end an article, and keeps the words of links, headings and lists. Of templates it knows
quantities ("{{convert|5|km}}" is "5 km") and foreign words ("{{lang|de|Wort}}"); what an article
writes with any other is lost. Compare perplexities measured on the same cleaned text with each
other, never with a number from another cleaner.
"""

import bz2
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

TAIL_HEADINGS = (
    "See also|References|External links|Notes|Footnotes|Further reading|Bibliography|Sources|"
    "Works cited|Citations|Notes and references"
)
_TAIL = re.compile(rf"^==\s*(?:{TAIL_HEADINGS})\s*==\s*$.*", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|score|imagemap|source|syntaxhighlight)\b"
    r"(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_QUANTITY = re.compile(r"\{\{(?:convert|cvt)\|([^{}|]+)\|([^{}|]+)[^{}]*\}\}", re.IGNORECASE)
_FOREIGN_WORDS = re.compile(r"\{\{lang\|[^{}|]*\|([^{}|]*)[^{}]*\}\}", re.IGNORECASE)
_INNERMOST_TEMPLATE = re.compile(r"\{\{(?:(?!\{\{|\}\}).)*\}\}", re.DOTALL)
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_INNERMOST_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//\S+\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
_QUOTES = re.compile(r"'{2,5}")
_NAMESPACED = re.compile(r":?(?:File|Image|Category|[a-z]{2,3}):", re.IGNORECASE)


def _remove_nested(pattern: re.Pattern[str], text: str) -> str:
    """Remove innermost matches until none is left."""
    count = 1
    while count:
        text, count = pattern.subn("", text)
    return text


def _link_words(match: re.Match[str]) -> str:
    """The words a reader sees of one link; nothing for files and categories."""
    target, _, words = match[1].partition("|")
    if _NAMESPACED.match(target):
        return ""
    return words.rpartition("|")[2] or target


def clean(wikitext: str) -> str:
    """Plain paragraphs of one article, separated by blank lines.

    Args:
        wikitext: the source of an article as MediaWiki stores it.

    Returns:
        The text without mark-up and without the sections of links at the end.
    """
    text = _DROPPED_ELEMENT.sub("", _COMMENT.sub("", wikitext))
    text = _QUANTITY.sub(r"\1 \2", _TAIL.sub("", text))
    text = _FOREIGN_WORDS.sub(r"\1", text)
    text = _remove_nested(_INNERMOST_TABLE, _remove_nested(_INNERMOST_TEMPLATE, text))
    count = 1
    while count:
        text, count = _INNERMOST_LINK.subn(_link_words, text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = unescape(_QUOTES.sub("", _TAG.sub("", text)))
    text = _LIST_MARK.sub("", _HEADING.sub(r"\1", text))
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"\((?:[\s,;]|or|and)*\)", "", text)  # parentheses that held only templates
    text = re.sub(r"\([\s,;]+", "(", text)
    text = re.sub(r" +([,.;:)])", r"\1", re.sub(r" {2,}", " ", text))
    paragraphs = (line.strip(" |{}[]") for line in text.splitlines())
    return "\n\n".join(line for line in paragraphs if line)


def articles(dump: Path, *, min_characters: int) -> Iterator[str]:
    """Cleaned articles of a bzip2 MediaWiki dump in its order, each under its title.

    Args:
        dump: ``pages-articles`` XML, compressed with bzip2.
        min_characters: articles whose cleaned text is shorter are left out.
    """
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            is_article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            wikitext = page.findtext("{*}revision/{*}text") or ""
            if is_article:
                text = clean(wikitext)
                if len(text) >= min_characters:
                    yield f"{page.findtext('{*}title')}\n\n{text}"
            page.clear()
