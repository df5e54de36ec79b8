"""Search on a judged collection: how good the reference finds it, and what a plan loses.

Figures follow their usual definitions, as trec_eval computes them: gains are the judgements
themselves, discounted by log2(rank + 1). All documents are ranked; of equally near ones the first
in the file comes first.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem import data
from lowmem.artifact import strict_json
from lowmem.data import Row
from lowmem.disk import shown_name
from lowmem.errors import InputError
from lowmem.fidelity import neighbours
from lowmem.fidelity.directions import Floats, Vectors
from lowmem.fidelity.neighbours import Indices
from lowmem.fidelity.statistics import LEVEL, interval_of_mean
from lowmem.text.reading import read_records

DEPTH = 100
FIGURES = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
_MOST_NAMED = 5
_QRELS = ("qrels.tsv", "qrels/test.tsv")


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and which documents answer which query.

    Attributes:
        name: The directory's name.
        documents: What is searched.
        queries: Those with at least one relevant document.
        relevant: Of each query, the position of each relevant document and its judgement, above 0.
        blank_documents: How many documents have no text and are left out.
        all_documents: How many documents the collection has, where only a part is taken.
    """

    name: str
    documents: tuple[Row, ...]
    queries: tuple[Row, ...]
    relevant: tuple[Mapping[int, int], ...]
    blank_documents: int
    all_documents: int

    @property
    def rows(self) -> tuple[Row, ...]:
        """Documents, then queries."""
        return self.documents + self.queries

    @property
    def sha256(self) -> str:
        """Identity of texts and judgements."""
        judged = [sorted(judgements.items()) for judgements in self.relevant]
        content = {"texts": data.sha256(self.rows), "relevant": judged}
        return hashlib.sha256(strict_json.canonical(content)).hexdigest()

    @property
    def own_documents(self) -> Indices:
        """The document that has the id of each query, int64 [queries], -1 where there is none.

        It is the query itself, as in ArguAna, and no answer to it: BEIR leaves it out.
        """
        places = {row.id: place for place, row in enumerate(self.documents)}
        return np.array([places.get(row.id, neighbours.NOTHING) for row in self.queries])

    def part(self, documents: int) -> Collection:
        """A smaller collection: some queries, all that answers them, and other documents.

        Queries are taken in the order of the hashes of their texts as long as what answers them
        is at most half of the documents (the first whatever it needs), then documents in the same
        way. A search among fewer documents is easier, for the reference and for a plan.

        Args:
            documents: How many documents to keep; where there are no more, all stay.
        """
        if documents >= len(self.documents):
            return self
        kept: set[int] = set()
        queries: list[int] = []
        for query in _by_hash(self.queries):
            answers = kept | set(self.relevant[query])
            if not queries or len(answers) <= documents // 2:
                kept = answers
                queries.append(query)
        others = (index for index in _by_hash(self.documents) if index not in kept)
        places = sorted([*kept, *(next(others) for _ in range(documents - len(kept)))])
        moved = {old: new for new, old in enumerate(places)}
        queries.sort()
        return replace(
            self,
            documents=tuple(self.documents[place] for place in places),
            queries=tuple(self.queries[query] for query in queries),
            relevant=tuple(
                {moved[old]: judgement for old, judgement in self.relevant[query].items()}
                for query in queries
            ),
        )


def read_collection(directory: Path, task: str | None = None) -> Collection:
    """Reads a collection in BEIR's layout.

    That is ``corpus.jsonl`` {"_id", "title", "text"}, ``queries.jsonl`` {"_id", "text"}, and
    ``qrels.tsv`` or ``qrels/test.tsv`` with the header "query-id corpus-id score". A document is
    embedded as its title, a space and its text; one without any is left out.

    Args:
        directory: Where the files lie.
        task: The queries' instruction, or None for the contract's default task.

    Raises:
        InputError: A file is missing or damaged, an id stands twice, a judgement names an id that
            is not there, or no query has a relevant document.
    """
    documents = _read_texts(directory / "corpus.jsonl", "document", None)
    queries = _read_texts(directory / "queries.jsonl", "query", task)
    qrels = next((directory / name for name in _QRELS if (directory / name).exists()), None)
    if qrels is None:
        raise InputError(f"{directory} must hold {' or '.join(_QRELS)}, and has neither")
    judged = _read_qrels(qrels, {row.id for row in queries}, {row.id for row in documents})
    filled = tuple(row for row in documents if row.text)
    place = {row.id: index for index, row in enumerate(filled)}
    asked = []
    relevant = []
    for row in queries:
        found = {place[id_]: score for id_, score in judged.get(row.id, {}).items() if id_ in place}
        if found:
            asked.append(row)
            relevant.append(found)
    if not asked:
        raise InputError(f"{qrels} names no relevant document for any query")
    return Collection(
        shown_name(directory.resolve()),
        filled,
        tuple(asked),
        tuple(relevant),
        len(documents) - len(filled),
        len(filled),
    )


def scores(ranked: Indices, relevant: Sequence[Mapping[int, int]]) -> dict[str, Floats]:
    """The figures of each query, from 0 to 1.

    nDCG@10 = Σ gain / log2(rank + 1) over the first ten, divided by the same sum of the best
    order; recall@k = share of the relevant documents among the first k; MRR@10 = 1 / rank of the
    first relevant one, 0 beyond the tenth.

    Args:
        ranked: Documents of each query, the nearest first, int64 [queries, depth].
        relevant: Document to gain, of each query.

    Returns:
        Figure to float64 [queries].
    """
    depth = ranked.shape[1]
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for places, gains in zip(ranked, relevant, strict=True):
        gained = np.array([gains.get(int(place), 0) for place in places], np.float64)
        best = np.sort(np.array(list(gains.values()), np.float64))[::-1][:10]
        ideal = float(best @ (1 / np.log2(np.arange(2, len(best) + 2))))
        hits = gained > 0
        first = np.flatnonzero(hits[:10])
        found["ndcg@10"].append(float(gained[:10] @ discounts[:10]) / ideal)
        found["recall@10"].append(float(hits[:10].sum()) / len(gains))
        found["recall@100"].append(float(hits[:100].sum()) / len(gains))
        found["mrr@10"].append(1 / (1 + int(first[0])) if len(first) else 0.0)
    return {figure: np.array(values) for figure, values in found.items()}


def judge(collection: Collection, reference: Vectors, vectors: Vectors) -> dict[str, Any]:
    """The ``retrieval`` of a report: reference and plan side by side.

    Args:
        collection: The collection.
        reference: float32 [documents + queries, d], in the order of ``collection.rows``.
        vectors: Those of the plan, the same shape.
    """
    count = len(collection.documents)
    itself = collection.own_documents
    before, now = (
        _without(neighbours.search(side[count:], side[:count], DEPTH + 1), itself)
        for side in (reference, vectors)
    )
    sides = [scores(ranked, collection.relevant) for ranked in (before, now)]
    figures = {}
    for name in FIGURES:
        difference = sides[1][name] - sides[0][name]
        figures[name] = {
            "reference": float(sides[0][name].mean()),
            "plan": float(sides[1][name].mean()),
            "difference": float(difference.mean()),
            "interval": list(interval_of_mean(difference)),
        }
    return {
        "name": collection.name,
        "sha256": collection.sha256,
        "documents": count,
        "all_documents": collection.all_documents,
        "blank_documents": collection.blank_documents,
        "queries": len(collection.queries),
        "level": LEVEL,
        "figures": figures,
        "overlap": neighbours.overlap_of_searches(before, now, count),
    }


def _without(ranked: Indices, itself: Indices) -> Indices:
    """Each query's documents less itself, at most ``DEPTH``, the order kept."""
    is_other = ranked != itself[:, None]
    order = np.argsort(~is_other, axis=1, kind="stable")
    moved: Indices = np.where(is_other, ranked, neighbours.NOTHING)
    result: Indices = np.take_along_axis(moved, order, axis=1)[:, :DEPTH]
    return result


def _read_texts(path: Path, input_type: str, task: str | None) -> list[Row]:
    rows = []
    for line, fields in read_records(path, "_id"):
        id_, title, text = (fields.get(key, "") for key in ("_id", "title", "text"))
        is_text = isinstance(title or "", str) and isinstance(text, str)
        if not (isinstance(id_, str) and id_ and is_text):
            raise InputError(f'line {line} of {path} must have the strings "_id" and "text"')
        whole = f"{title or ''} {text}".strip()
        if input_type == "query" and not whole:
            raise InputError(f"line {line} of {path} is empty: every query needs a text")
        rows.append(Row(id_, whole, input_type, task))
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        repeated = sorted(id_ for id_, count in Counter(ids).items() if count > 1)[:_MOST_NAMED]
        raise InputError(f"{path} must have each _id once, got several {', '.join(repeated)}")
    if not rows:
        raise InputError(f"{path} holds no text")
    return rows


def _read_qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not lines or lines[0].split("\t") != ["query-id", "corpus-id", "score"]:
        raise InputError(f"{path} must begin with query-id, corpus-id and score, between tabs")
    judged: dict[str, dict[str, int]] = {}
    seen: dict[tuple[str, str], int] = {}
    unknown = []
    for number, line in enumerate(lines[1:], 2):
        parts = line.split("\t")
        if len(parts) != 3 or not re.fullmatch("-?[0-9]{1,9}", parts[2].strip()):
            raise InputError(f"line {number} of {path} must be two ids and a whole number")
        query, document, score = parts[0], parts[1], int(parts[2])
        if query not in queries or document not in documents:
            unknown.append(f"line {number}")
        elif seen.setdefault((query, document), score) != score:
            raise InputError(
                f"line {number} of {path} judges a pair again, and otherwise than before"
            )
        elif score > 0:
            judged.setdefault(query, {})[document] = score
    if unknown:
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        raise InputError(
            f"{path} may only name ids that stand in the collection's queries and corpus, "
            f"unlike {', '.join(unknown[:_MOST_NAMED])}{more}"
        )
    return judged


def _by_hash(rows: Sequence[Row]) -> list[int]:
    """Positions in an order that depends on the texts alone."""
    keys = [hashlib.sha256(f"{row.id}\n{row.text}".encode()).digest() for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)
