import json
import math
from pathlib import Path

import numpy as np
import pytest

from lowmem.errors import InputError
from lowmem.fidelity import neighbours, retrieval
from lowmem.fidelity.retrieval import read_collection, scores

DOCUMENTS = [
    {"_id": "d1", "title": "Bread", "text": "rises because yeast ferments sugar."},
    {"_id": "d2", "title": "", "text": "The reef lies off Queensland."},
    {"_id": "d3", "title": "", "text": " "},
    {"_id": "d4", "text": "Leaves make sugar out of light."},
]
QUERIES = [
    {"_id": "q1", "text": "Why does bread rise?"},
    {"_id": "q2", "text": "Where is the reef?"},
    {"_id": "q3", "text": "Who asked?"},
]
QRELS = [("q1", "d1", 2), ("q1", "d4", 1), ("q2", "d2", 1), ("q2", "d1", 0), ("q3", "d3", 1)]


def write(folder: Path, *, qrels: object = QRELS, name: str = "qrels.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, values in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        lines = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{file}.jsonl").write_text(lines)
    lines = ["\t".join(map(str, row)) for row in qrels]  # type: ignore[attr-defined]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def ranked(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def test_ndcg_recall_and_mrr_of_a_worked_example() -> None:
    found = scores(ranked([4, 7, 5], [0, 1, 2]), [{5: 1, 7: 3}, {9: 1}])
    # gains 3 and 1 at ranks 2 and 3; the best order has them at 1 and 2
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx([(3 / math.log2(3) + 1 / math.log2(4)) / ideal, 0])
    assert found["recall@10"].tolist() == [1, 0]
    assert found["mrr@10"].tolist() == [0.5, 0]


def test_figures_stop_at_their_depth() -> None:
    order = list(range(100))
    found = scores(ranked(order), [{10: 1, 99: 1}])
    assert {name: values.tolist() for name, values in found.items()} == {
        "ndcg@10": [0],
        "recall@10": [0],
        "recall@100": [1],
        "mrr@10": [0],
    }


def test_the_ideal_of_more_than_ten_answers_is_ten_at_the_top() -> None:
    found = scores(ranked(list(range(20))), [dict.fromkeys(range(15), 1)])
    assert found["ndcg@10"] == pytest.approx([1])
    assert found["recall@10"] == pytest.approx([10 / 15])


def test_a_collection_is_read_as_beir_lays_it_out(tmp_path: Path) -> None:
    for name in ("qrels.tsv", "qrels/test.tsv"):
        found = read_collection(write(tmp_path / name[:5], name=name), task="search")
        assert [row.text for row in found.documents] == [
            "Bread rises because yeast ferments sugar.",
            "The reef lies off Queensland.",
            "Leaves make sugar out of light.",
        ]
        assert [(row.text, row.input_type, row.task) for row in found.queries] == [
            ("Why does bread rise?", "query", "search"),
            ("Where is the reef?", "query", "search"),
        ]
        assert found.relevant == ({0: 2, 2: 1}, {1: 1})
        assert found.blank_documents == 1


def test_equal_vectors_lose_nothing_and_swapped_ones_do(tmp_path: Path) -> None:
    found = read_collection(write(tmp_path / "set"))
    reference = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, 1], [1, 0, 0.1], [0, 1, 0]], np.float32)
    same = retrieval.judge(found, reference, 2 * reference)
    assert same["figures"]["ndcg@10"] == {
        "reference": 1.0,
        "plan": 1.0,
        "difference": 0.0,
        "interval": [0.0, 0.0],
    }
    assert same["overlap"] == {"1": 1.0, "10": None}
    worse = retrieval.judge(found, reference, reference[[1, 0, 2, 3, 4]])
    assert worse["name"] == "set"
    assert worse["overlap"]["1"] == 0.0
    figure = worse["figures"]["mrr@10"]
    assert figure["plan"] < figure["reference"] == 1.0
    assert figure["difference"] == pytest.approx(figure["plan"] - 1)
    assert figure["interval"][0] <= figure["difference"] <= figure["interval"][1]


def test_a_query_that_is_a_document_does_not_find_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", qrels=[("q1", "d1", 1)])
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "q1", "text": "Why does bread rise?"}) + "\n")
    collection = read_collection(folder)
    vectors = np.array([[1, 0.2], [0, 1], [-1, 0], [1, 0], [1, 0]], np.float32)
    found = retrieval.judge(collection, vectors, vectors)
    assert found["figures"]["ndcg@10"]["reference"] == 1
    assert found["figures"]["mrr@10"]["reference"] == 1


def test_a_pair_that_is_judged_twice_must_be_judged_alike(tmp_path: Path) -> None:
    read_collection(write(tmp_path / "alike", qrels=[*QRELS, QRELS[0]]))
    for other in (0, 1):
        with pytest.raises(InputError, match=r"line 7 of .*judges a pair again"):
            read_collection(write(tmp_path / "set", qrels=[*QRELS, ("q1", "d1", other)]))


def test_a_part_keeps_what_answers_its_queries(tmp_path: Path) -> None:
    documents = [{"_id": str(n), "text": f"text {n}"} for n in range(40)]
    queries = [{"_id": f"q{n}", "text": f"question {n}"} for n in range(10)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    qrels = [f"q{n}\t{3 * n}\t1\nq{n}\t{3 * n + 1}\t2" for n in range(10)]
    (tmp_path / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]))
    whole = read_collection(tmp_path)
    part = whole.part(12)
    assert len(part.documents) == 12
    assert part.all_documents == 40
    assert len(part.queries) == 3
    for query, answers in zip(part.queries, part.relevant, strict=True):
        first = 3 * int(query.id[1:])
        named = {part.documents[place].id: score for place, score in answers.items()}
        assert named == {str(first): 1, str(first + 1): 2}
    assert whole.part(40) is whole
    assert {row.id for row in part.documents} <= {row.id for row in whole.part(20).documents}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus.jsonl": '{"_id": 5, "text": "x"}\n'}, 'line 1 of .* must have the strings "_id"'),
        (
            {"corpus.jsonl": '{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}\n'},
            "must have each _id once, got several d1",
        ),
        ({"corpus.jsonl": ""}, "corpus.jsonl holds no text"),
        ({"queries.jsonl": '{"_id": "q1", "text": " "}\n'}, "line 1 of .* every query needs a"),
        ({"queries.jsonl": "{"}, "line 1 of .*queries.jsonl is not JSON"),
        ({"qrels.tsv": "q1 d1 1\n"}, "must begin with query-id, corpus-id and score"),
        ({"qrels.tsv": "query-id\tcorpus-id\tscore\nq1\td1\n"}, "line 2 of .* must be two ids"),
        (
            {"qrels.tsv": "query-id\tcorpus-id\tscore\nq1\td9\t1\nq9\td1\t1\n"},
            "may only name ids that .* unlike line 2, line 3",
        ),
        (
            {"qrels.tsv": "query-id\tcorpus-id\tscore\nq3\td3\t1\n"},
            "names no relevant document for any query",
        ),
    ],
)
def test_a_damaged_collection_is_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    write(tmp_path)
    for name, text in change.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_collection(tmp_path)


def test_a_collection_without_judgements_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "qrels.tsv").unlink()
    with pytest.raises(InputError, match=r"must hold qrels\.tsv or qrels/test\.tsv"):
        read_collection(tmp_path)
    (tmp_path / "qrels.tsv").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"qrels\.tsv cannot be read"):
        read_collection(tmp_path)


@pytest.mark.parametrize("score", ["--5", "1" * 400, "1.0", ""])
def test_a_judgement_is_a_whole_number(tmp_path: Path, score: str) -> None:
    folder = write(tmp_path / "set", qrels=[("q1", "d1", score)])
    with pytest.raises(InputError, match=r"line 2 of .* must be two ids and a whole number"):
        read_collection(folder)


def test_an_overlap_says_nothing_where_all_documents_are_found() -> None:
    before, now = ranked([0, 1, 2], [1, 0, 2]), ranked([0, 2, 1], [2, 0, 1])
    assert neighbours.overlap_of_searches(before, now, 3) == {"1": 0.5, "10": None}
