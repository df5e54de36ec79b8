"""What is taken of public sets, and how their record reads."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(script_named: Callable[[str], ModuleType]) -> ModuleType:
    return script_named("open_sets")


def written(folder: Path, **files: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_a_collection_gives_titles_with_texts_and_queries_and_nothing_empty(
    script: ModuleType, tmp_path: Path
) -> None:
    folder = written(
        tmp_path / "a",
        corpus=[{"_id": "1", "title": "Cats", "text": "purr."}, {"_id": "2", "text": " "}],
        queries=[{"_id": "q", "text": "Who purrs?"}],
    )
    assert script.texts_of(folder) == ["Cats purr.", "Who purrs?"]


def test_pairs_give_each_sentence_once(script: ModuleType, tmp_path: Path) -> None:
    rows = [{"a": "one", "b": "two"}, {"a": "two", "b": "three"}]
    assert script.texts_of(written(tmp_path / "b", pairs=rows)) == ["one", "two", "three"]


def test_a_hundred_are_taken_from_everywhere(script: ModuleType) -> None:
    texts = [str(number) for number in range(250)]
    chosen = script.some(texts)
    assert len(set(chosen)) == script.TEXTS
    assert (chosen[0], chosen[-1]) == ("0", "247")
    assert script.some(texts[:99]) == texts[:99]


def test_a_long_text_is_cut_at_a_blank(script: ModuleType) -> None:
    cut = script.cut("word " * 1000)
    assert script.LONGEST_CHARACTERS - 5 <= len(cut) <= script.LONGEST_CHARACTERS
    assert cut.endswith("word")
    assert script.cut("short") == "short"
    assert script.cut("o" * 2000) == "o" * script.LONGEST_CHARACTERS
