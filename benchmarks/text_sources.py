"""The public sets that the built-in texts are taken from: books, PEPs and sentence pairs.

What is read is cut into parts that can stand for themselves; what cannot is marked ``other``.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BOOKS = {
    "gutenberg-1342-pride-and-prejudice": "pride",
    "gutenberg-1661-sherlock-holmes": "holmes",
    "gutenberg-11-alice": "alice",
}
TEMPLATE = "pep-0009"  # a model of a PEP, indented as a whole

LANGUAGES = {  # ISO 639-3 of the source to ISO 639-1
    "ara": "ar", "cmn": "zh", "deu": "de", "ell": "el", "fra": "fr", "heb": "he", "hin": "hi",
    "jpn": "ja", "kor": "ko", "pes": "fa", "rus": "ru", "spa": "es", "tha": "th", "tur": "tr",
    "ukr": "uk", "vie": "vi",
}  # fmt: skip

# An eighth of Tatoeba is about Tom and his friends; the rest is what a report should not quote.
UNWANTED = re.compile(
    r"\b(Tom|Mary|Sami|Layla|Boston)\b|kill|murder|suicide|\bdie[ds]?\b|dead|death|dying|\bsex|"
    r"rape|drunk|drug|\bgun|\bshot\b|shoot|hate|stupid|idiot|\bfool|\bfat\b|\bwar\b|fuck|shit|"
    r"damn|naked|virgin|\bass\b|\bhell\b|ugly|slave|slept|dick\b|freak|retard",
    re.IGNORECASE,
)
# Lines of Tatoeba that were read and left out.
LEFT_OUT = frozenset(
    "ar-0631 ar-0865 de-0189 de-0705 de-0720 el-0745 el-0931 es-0610 fr-0708 he-0531 hi-0575 "
    "ja-0494 ko-0166 ko-0880 tr-0468 tr-0762 uk-0744 uk-0815 vi-0562 vi-0640 zh-0708".split()
)


class Part(NamedTuple):
    """One block of a document: ``prose``, ``code``, ``list``, ``heading`` or ``other``."""

    form: str
    text: str


class Document(NamedTuple):
    """A chapter or a PEP, its name (``pride-16``, ``pep-309``) and its parts in order."""

    name: str
    source: str
    parts: list[Part]


class Pair(NamedTuple):
    """A Tatoeba sentence and its English translation; ``name`` is language and line."""

    name: str
    lang: str
    foreign: str
    english: str


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Returns the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_books(path: Path) -> Iterator[Document]:
    """Yields the chapters; headings, verses, letter heads and rows of stars are ``other``."""
    for row in read_jsonl(path):
        book, chapter = row["id"].split("/")
        parts = []
        for block in row["text"].split("\n\n"):
            text = re.sub(r"_([^_]+)_", r"\1", block)  # Gutenberg's mark of italics
            is_prose = (
                re.match(r"[A-Z“‘\"'(]", text) is not None
                and re.search(r"[.!?][”’\"')]*$", text) is not None
                and not re.match(r"(?i)chapter|adventure|[ivx]+\.", text)
                and not re.search(r"[\[\]*\n_]", text)
            )
            parts.append(Part("prose" if is_prose else "other", text))
        yield Document(f"{BOOKS[book]}-{int(chapter):02d}", BOOKS[book], parts)


def read_factbook(path: Path) -> Iterator[Document]:
    """Yields descriptions of countries and territories, each of one part."""
    for row in read_jsonl(path):
        yield Document(f"factbook-{row['id']}", "factbook", [Part("prose", row["text"])])


MARKUP = re.compile(
    r"``(?P<literal>[^`]+)``"
    r"|:(?:py:)?(?P<role>[\w:]+):`(?P<title>[^`<]+?)(?:\s*<[^>`]*>)?`"
    r"|`(?P<link>[^`<]+?)(?:\s*<[^>`]*>)?`__?"
    r"|\s*\[[#\w*-]+\]_"
)


def plain(block: str) -> str:
    """Returns a paragraph of a PEP without reStructuredText roles, links and footnote marks."""

    def replace(match: re.Match[str]) -> str:
        if match["literal"]:
            return f"`{match['literal']}`"
        if match["role"]:
            title = match["title"].lstrip("~!")
            return f"PEP {title}" if match["role"] == "pep" and title.isdigit() else title
        return match["link"] or ""

    text = MARKUP.sub(replace, block)
    return re.sub(r"\s*::$", ":", " ".join(text.split()))


def is_python(code: str) -> bool:
    """Whether an example looks like Python and not like C, JSON, a shell or a grammar."""
    has_statement = re.search(
        r"(?m)^\s*(>>> |def \w+\(|class \w+.*:$|from \w.* import |import \w|for .* in .*:$|"
        r"with .*:$|@\w+|if .*:$|try:$|while .*:$|async def )",
        code,
    )
    has_other = re.search(
        r"(?m);$|^\s*[{}]\s*$|\{$|^#include|^[*-] |^\$ |::=|^static |</|``|"
        r"\A[A-Z][\w']*:?( [A-Za-z,'\"]+){3}",
        code,
    )
    return has_statement is not None and has_other is None


def read_peps(path: Path) -> Iterator[Document]:
    """Yields the PEPs that say they are in the public domain, in parts."""
    for row in read_jsonl(path):
        if row["id"] == TEMPLATE or not re.search(r"(?i)public\s+domain", row["text"]):
            continue
        number = int(row["id"].removeprefix("pep-"))
        body = row["text"].split("\n\n", 1)[1]  # after the header
        yield Document(f"pep-{number}", "pep", list(pep_parts(body)))


def pep_parts(body: str) -> Iterator[Part]:
    """Yields the parts of a PEP's body; sections of references and thanks are left out."""
    underlined = re.sub(r"(?m)^(\S.*)\n([=\-~'\"^`*+#.])\2{2,}\s*$", "\n\n\x00\\1\n\n", body)
    blocks = [block for block in re.split(r"\n[ \t]*\n", underlined) if block.strip()]
    skipped = False
    position = 0
    while position < len(blocks):
        block = blocks[position].strip("\n").rstrip()
        position += 1
        if block.startswith("\x00"):
            title = plain(block[1:])
            skipped = bool(
                re.match(
                    r"(?i)references|copyright|acknowledg|footnotes|thanks|post-?history", title
                )
            )
            yield Part("heading", title)
        elif skipped:
            continue
        elif block.startswith(" "):
            taken = [block]
            while position < len(blocks) and blocks[position].startswith(" "):
                taken.append(blocks[position].strip("\n").rstrip())
                position += 1
            code = textwrap.dedent("\n\n".join(taken).expandtabs(8))
            is_code = code[0] != " " and len(code.split("\n")) >= 2 and is_python(code)
            yield Part("code" if is_code else "other", code)
        elif re.match(r"\.\. code(-block)?::( python| pycon)?\s*$", block):
            continue  # what follows is looked at as code by itself
        elif re.match(r"[*-] ", block):
            items = re.split(r"\n+(?=[*-] )", block)
            if any(is_marked(plain(item)) for item in items):
                yield Part("other", block)
            else:
                yield Part("list", "\n".join(plain(item) for item in items))
        elif re.match(r"[A-Z`'\"(]", block) and "\n " not in block and not is_marked(plain(block)):
            is_whole = not re.search(
                r"\b(in|see|at|from|of|by|to|and|with|as)\s*\[[#\w*-]+\]_", block
            )
            yield Part("prose" if is_whole else "other", plain(block))
        else:
            yield Part("other", block)


def is_marked(text: str) -> bool:
    """Whether markup is left that :func:`plain` does not know."""
    return (
        re.search(r"\w_(?![\w`(])|`_|::|:\w+:`|\*\*|\|\w|https?:|\+--|==|\x00|\(\s*\)", text)
        is not None
    )


def read_tatoeba(path: Path) -> Iterator[Pair]:
    """Yields the pairs of ordinary sentences."""
    lines: Counter[str] = Counter()
    for row in read_jsonl(path):
        lines[row["lang"]] += 1
        foreign, english = row["a"].strip(), row["b"].strip()
        lang = LANGUAGES[row["lang"]]
        name = f"{lang}-{lines[row['lang']]:04d}"
        latin_too = lang not in {"de", "es", "fr", "tr", "vi"} and re.search("[A-Za-z]", foreign)
        if name in LEFT_OUT or UNWANTED.search(english) or not re.search(r"[.!?]$", english):
            continue
        if latin_too or re.match(r"[-'\"«„“]", foreign) or foreign[0].islower():
            continue
        if "(" in foreign or "  " in foreign:
            continue
        yield Pair(f"tatoeba-{name}", lang, foreign, english)
