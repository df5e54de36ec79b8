"""Passages that may become texts: parts of documents, sentences, and sentences joined.

Nothing is random: every draw takes the first of an order by SHA-256.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from functools import cache
from typing import NamedTuple, TypeVar

from text_sources import Document, Pair

UNSPACED = {"ja", "th", "zh"}  # languages that write no blank between sentences

Count = Callable[[str], int]
"""Gives the tokens of a text, with BOS and EOS."""
Thing = TypeVar("Thing")


def drawn(things: Iterable[Thing], salt: str, name: Callable[[Thing], str]) -> list[Thing]:
    """Returns the things in the order of SHA-256 over salt and name: a fixed shuffle."""
    return sorted(things, key=lambda thing: digest(salt, name(thing)))


def digest(salt: str, name: str) -> bytes:
    """Returns the key of one draw."""
    return hashlib.sha256(f"{salt}\n{name}".encode()).digest()


class Candidate(NamedTuple):
    """A text that may become a row, its document, and the parts of documents that it takes."""

    name: str
    text: str
    lang: str
    document: str
    spots: frozenset[tuple[str, int]]


def runs(document: Document, low: int, high: int, count: Count) -> list[Candidate]:
    """Returns passages of whole paragraphs of prose, one after the other, of low to high tokens.

    The shortest length asked of each passage lies between ``low`` and the middle of the range, so
    that lengths spread over the range.
    """
    found = []
    start = 0
    while start < len(document.parts):
        text = ""
        wanted = low + digest("length", f"{document.name}/{start}/{low}")[0] * (high - low) // 512
        stop = start
        while stop < len(document.parts) and count(text) < wanted:
            part = document.parts[stop]
            if part.form != "prose" or part.text.endswith(":"):
                break
            text = f"{text}\n\n{part.text}" if text else part.text
            stop += 1
        if wanted <= count(text) <= high:
            found.append(candidate(document, range(start, stop), text))
        start = max(stop, start + 1)
    return found


def whole(document: Document, low: int, high: int, count: Count) -> list[Candidate]:
    """Returns the document itself, which is of one part, if it has low to high tokens."""
    (part,) = document.parts
    return [candidate(document, range(1), part.text)] if low <= count(part.text) <= high else []


def sections(document: Document, low: int, high: int, count: Count) -> list[Candidate]:
    """Returns whole sections of a PEP, with title, lists and code, of low to high tokens."""
    heads = [i for i, part in enumerate(document.parts) if part.form == "heading"]
    found = []
    for start, stop in zip(heads, [*heads[1:], len(document.parts)], strict=True):
        parts = document.parts[start:stop]
        forms = Counter(part.form for part in parts)
        if forms["other"] or forms["list"] >= forms["prose"] or parts[-1].form == "list":
            continue
        blocks = [
            textwrap.indent(part.text, "    ") if part.form == "code" else part.text
            for part in parts
        ]
        text = "\n\n".join(blocks)
        if len(parts) > 1 and low <= count(text) <= high:
            found.append(candidate(document, range(start, stop), text))
    return found


def examples(document: Document, low: int, high: int, count: Count) -> list[Candidate]:
    """Returns the Python examples of a PEP of low to high tokens."""
    return [
        candidate(document, range(i, i + 1), part.text)
        for i, part in enumerate(document.parts)
        if part.form == "code" and low <= count(part.text) <= high
    ]


def candidate(document: Document, parts: range, text: str) -> Candidate:
    """Returns a passage of a document, named after its first part."""
    spots = frozenset((document.name, part) for part in parts)
    return Candidate(f"{document.name}-{parts.start:03d}", text, "en", document.name, spots)


def cut_short(passages: Iterable[Candidate]) -> list[Candidate]:
    """Returns the passages without their last words, as tools leave them that cut by length."""
    found = []
    for one in passages:
        kept = one.text[: len(one.text) * (128 + digest("cut", one.name)[0] // 2) // 256]
        text = (kept if one.lang in UNSPACED else kept.rpartition(" ")[0]).rstrip()
        if text[-1:].isalnum():
            found.append(one._replace(text=text))
    return found


class Sources:
    """What one set may draw from.

    Attributes:
        documents: Chapters, PEPs and descriptions of countries.
        pairs: Sentences and their translations.
        count: Tokens of a text.
    """

    def __init__(self, documents: Sequence[Document], pairs: Sequence[Pair], count: Count):
        self.documents = documents
        self.pairs = pairs
        self.count = cache(count)

    def cut(
        self,
        how: Callable[[Document, int, int, Count], list[Candidate]],
        sources: tuple[str, ...],
        low: int,
        high: int,
    ) -> list[Candidate]:
        """Returns every passage of the sources named, cut in one of the ways above."""
        found = (how(d, low, high, self.count) for d in self.documents if d.source in sources)
        return [one for passages in found for one in passages]

    def foreign(self, lang: str, low: int, high: int, question: bool = False) -> list[Candidate]:
        """Returns sentences of a language of low to high tokens, questions or statements."""
        return [
            Candidate(pair.name, pair.foreign, lang, pair.name, frozenset({(pair.name, 0)}))
            for pair in self.pairs
            if pair.lang == lang
            and low <= self.count(pair.foreign) <= high
            and pair.english.endswith("?") == question
        ]

    def paragraphs(self, lang: str, low: int, taken: Set[tuple[str, int]]) -> list[Candidate]:
        """Returns sentences of a language that are not taken, joined to at least ``low`` tokens.

        A language that has sentences alone would otherwise have no text of any length.
        """
        found, group = [], []
        blank = "" if lang in UNSPACED else " "
        for pair in drawn(self.pairs, "paragraphs", lambda pair: pair.name):
            if pair.lang != lang or (pair.name, 0) in taken:
                continue
            group.append(pair)
            text = blank.join(pair.foreign for pair in group)
            if self.count(text) >= low:
                first = group[0].name
                name = "+".join([first, *(pair.name.rpartition("-")[2] for pair in group[1:])])
                spots = frozenset((pair.name, 0) for pair in group)
                found.append(Candidate(name, text, lang, first, spots))
                group = []
        return found

    def english(self, low: int, high: int, question: bool = False) -> list[Candidate]:
        """Returns English sentences of low to high words, questions or statements."""
        return [
            Candidate(f"{pair.name}-en", pair.english, "en", pair.name, frozenset({(pair.name, 1)}))
            for pair in self.pairs
            if low <= len(pair.english.split()) <= high and pair.english.endswith("?") == question
        ]
