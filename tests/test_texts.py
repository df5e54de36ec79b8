"""The built-in texts hold what they promise, and no measured text has steered anything."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from importlib import resources
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowmem import data
from lowmem.errors import InputError

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "build_texts.py"
FILES = ("probe", "calibration", "workloads")


@pytest.fixture(scope="module")
def script(smollm2_path: Path) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module(SCRIPT.stem)


@pytest.fixture(scope="module")
def tokenizer(script: ModuleType) -> Any:
    return script.smollm2_tokenizer()


def tokens(script: ModuleType, tokenizer: Any, row: data.Row) -> int:
    return int(script.token_count(tokenizer, row.text, row.task))


def test_token_count_includes_template_bos_and_eos(script: ModuleType, tokenizer: Any) -> None:
    text = "Instruct: Find it.\nQuery: Where is it?"
    assert script.token_count(tokenizer, "Where is it?", "Find it.") == 2 + len(
        tokenizer.encode(text).ids
    )
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("name", "rows", "low", "high"),
    [
        ("probe", (190, 220), 17_000, 25_000),
        ("quick", (64, 64), 2_000, 4_000),
        ("calibration", (500, 600), 20_000, 24_000),
        ("workloads", (200, 400), 18_000, 21_000),
    ],
)
def test_set_is_within_its_budget(
    script: ModuleType, tokenizer: Any, name: str, rows: tuple[int, int], low: int, high: int
) -> None:
    chosen = data.load(name)
    assert rows[0] <= len(chosen) <= rows[1]
    assert low <= sum(tokens(script, tokenizer, row) for row in chosen) <= high


def test_probe_runs_from_three_words_to_one_text_near_4096_tokens(
    script: ModuleType, tokenizer: Any
) -> None:
    rows = data.load("probe")
    counts = sorted(tokens(script, tokenizer, row) for row in rows)
    assert 3_800 <= counts[-1] <= 4_050
    assert counts[-2] <= 1_500
    assert sum(400 <= count <= 1_500 for count in counts) >= 7
    assert sum(60 <= count <= 150 for count in counts) >= 40
    assert min(len(row.text.split()) for row in rows if row.lang == "en") == 3


def test_workloads_keep_to_the_lengths_of_their_kinds(script: ModuleType, tokenizer: Any) -> None:
    lengths = {"short": (8, 24), "mid": (60, 150), "long": (400, 1_000), "instructed": (20, 130)}
    rows = data.load("workloads")
    assert {row.kind for row in rows} == set(lengths)
    for row in rows:
        low, high = lengths[row.kind]
        assert low <= tokens(script, tokenizer, row) <= high, row.id
        assert (row.task is not None) == (row.kind == "instructed"), row.id


def test_no_two_sets_share_13_tokens_in_a_row(script: ModuleType, tokenizer: Any) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for name in FILES:
        for row in data.load(name):
            ids = tokenizer.encode(row.text).ids
            for start in range(len(ids) - 12):
                where = seen.setdefault(tuple(ids[start : start + 13]), name)
                assert where == name, f"{row.id} shares 13 tokens with {where}"


def test_no_row_lies_inside_a_row_of_another_set() -> None:
    for first, second in permutations(FILES, 2):
        outer = [row.text.casefold() for row in data.load(second)]
        for row in data.load(first):
            assert not any(row.text.casefold() in text for text in outer), row.id


def test_no_sentence_has_its_translations_in_two_sets() -> None:
    home: dict[str, str] = {}
    for name in FILES:
        for row in data.load(name):
            _, found, sentence = row.id.partition("-tatoeba-")
            if found:
                lang, _, lines = sentence.removesuffix("-en").partition("-")
                for line in lines.split("+"):
                    assert home.setdefault(f"{lang}-{line}", name) == name


def test_calibration_has_texts_of_some_length_in_every_language(
    script: ModuleType, tokenizer: Any
) -> None:
    rows = [row for row in data.load("calibration") if row.kind == "multilingual"]
    long = Counter(row.lang for row in rows if tokens(script, tokenizer, row) >= 150)
    assert set(long) == {row.lang for row in data.load("probe")} - {"en"}
    assert min(long.values()) == 2


def test_ids_and_texts_are_unique_among_all_sets() -> None:
    rows = [row for name in FILES for row in data.load(name)]
    assert [key for key, times in Counter(row.id for row in rows).items() if times > 1] == []
    assert [key for key, times in Counter(row.text for row in rows).items() if times > 1] == []


def test_quick_is_a_subset_of_probe_with_every_language_and_code_and_queries() -> None:
    probe, quick = data.load("probe"), data.load("quick")
    assert [row for row in probe if row in set(quick)] == list(quick)
    assert len(set(quick)) == 64
    assert {row.lang for row in quick} == {row.lang for row in probe}
    kinds = Counter(row.kind for row in quick)
    assert kinds["code"] >= 5
    assert kinds["question"] >= 16
    assert kinds["short"] >= 8
    assert kinds["prose"] >= 8


@pytest.mark.parametrize("name", ["probe", "calibration", "quick"])
def test_set_covers_kinds_languages_and_instructions(name: str) -> None:
    rows = data.load(name)
    kinds = {row.kind for row in rows}
    whole = {"prose", "question", "code", "short", "multilingual", "long"}
    assert kinds - {"cut"} | {"long"} == whole
    assert ("cut" in kinds) == (name != "calibration")
    assert len({row.lang for row in rows}) >= 10
    assert len({row.task for row in rows if row.task}) >= 5


@pytest.mark.parametrize("name", data.NAMES)
def test_rows_are_clean(name: str) -> None:
    for row in data.load(name):
        assert row.text, row.id
        assert row.text == row.text.strip(), row.id
        assert not {"\r", "\t", "\x00", "\ufeff", "\ufffd"} & set(row.text), row.id
        assert row.input_type == ("document" if row.task is None else "query"), row.id
        assert row.id.startswith(f"{row.kind}-"), row.id
        assert "Gutenberg" not in row.text, row.id


@pytest.mark.parametrize("name", FILES)
def test_file_has_one_object_a_line_with_keys_in_order(name: str) -> None:
    text = resources.files(data).joinpath(f"{name}.jsonl").read_bytes().decode()
    assert text.endswith("}\n")
    for line in text.removesuffix("\n").split("\n"):
        row = json.loads(line)
        assert list(row) == ["id", "text", "input_type", "task", "kind", "lang"]
        assert json.dumps(row, ensure_ascii=False) == line


def test_each_written_question_is_in_the_set_of_its_passage() -> None:
    written = SCRIPT.parent / "questions.jsonl"
    texts = [json.loads(line)["text"] for line in written.read_text("utf-8").splitlines()]
    rows = {name: data.load(name) for name in FILES}
    found = Counter(name for name in FILES for row in rows[name] if row.text in texts)
    assert sum(found.values()) == len(texts) == len(set(texts))
    assert min(found["probe"], found["workloads"]) >= 40
    for name in FILES:
        passages = {row.id.partition("-")[2] for row in rows[name] if row.task is None}
        for row in rows[name]:
            if row.text in texts:
                assert row.id.partition("-")[2].rpartition("-q")[0] in passages, row.id


def test_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        InputError,
        match=r"^the built-in texts are probe, quick, calibration, workloads, got 'prob'$",
    ):
        data.load("prob")


def test_sha256_is_over_what_a_model_is_given() -> None:
    # printf '{"id":"a","text":"é","input_type":"document","task":null}\n' | sha256sum
    row = data.Row("a", "é")
    assert data.sha256([row]) == (
        "a936bc8a12cb2114ed10fbbf38e5768b9777130b1d5896c6cdf7279898f9f36d"
    )
    assert data.sha256([replace(row, kind="prose", lang="fr")]) == data.sha256([row])
    assert data.sha256([replace(row, task="b")]) != data.sha256([row])
    assert data.sha256([row, replace(row, id="b")]) != data.sha256([replace(row, id="b"), row])


def test_sources_name_every_source_with_its_licence() -> None:
    sources = resources.files(data).joinpath("SOURCES.md").read_text("utf-8")
    used = {row.id.split("-")[1] for name in FILES for row in data.load(name)}
    assert used == {"pride", "holmes", "alice", "pep", "factbook", "tatoeba"}
    for name in used:
        assert f"| `*-{name}-*` |" in sources
    assert "Sentences from Tatoeba (https://tatoeba.org), CC BY 2.0 FR" in sources
    assert "facebookresearch/LASER" in sources
    assert "public domain" in sources


def test_script_rebuilds_the_files_byte_for_byte(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = os.environ.get("LOWMEM_TEXT_SOURCES")
    if source is None:
        pytest.skip("the original sets are missing: LOWMEM_TEXT_SOURCES names no folder")
    monkeypatch.setattr(
        sys, "argv", ["build_texts.py", "--source", source, "--output", f"{tmp_path}"]
    )
    script.main()
    for name in ("probe.jsonl", "quick.txt", "calibration.jsonl", "workloads.jsonl"):
        assert (tmp_path / name).read_bytes() == resources.files(data).joinpath(name).read_bytes()
