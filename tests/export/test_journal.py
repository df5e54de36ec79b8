from pathlib import Path

import pytest

from export.journal import Journal
from lowmem.errors import BundleError

WORK = "digest of the work"
STEPS = {
    "embedding": {"int4/model.safetensors": {"embed": 2**32 - 1}, "int8/model.safetensors": {}},
    "layer": {"int4/model.safetensors": {"layer.a": 0, "layer.b": 7}},
}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    journal.create(["int8", "int4"], WORK)
    return journal


def add_steps(journal: Journal) -> None:
    for step, files in STEPS.items():
        journal.append(step, files)


def test_a_new_journal_names_its_variants_and_no_step(journal: Journal) -> None:
    assert journal.variants() == ["int4", "int8"]
    assert journal.finished(WORK) == {}


def test_steps_are_read_as_they_were_appended(journal: Journal) -> None:
    add_steps(journal)
    assert journal.finished(WORK) == STEPS
    assert list(journal.finished(WORK)) == list(STEPS)


def test_other_work_has_no_finished_steps(journal: Journal) -> None:
    add_steps(journal)
    assert journal.finished("other work") == {}


def test_a_torn_last_line_does_not_count_wherever_it_ends(journal: Journal) -> None:
    add_steps(journal)
    whole = journal.steps_path.read_bytes()
    first = {"embedding": STEPS["embedding"]}
    begin = whole.index(b"\n") + 1
    for end in range(begin, len(whole)):
        journal.steps_path.write_bytes(whole[:end])
        assert journal.finished(WORK) == first
    journal.drop_torn_line()
    journal.append("layer", STEPS["layer"])
    assert journal.steps_path.read_bytes() == whole


def test_one_changed_byte_anywhere_is_found(journal: Journal) -> None:
    add_steps(journal)
    whole = journal.steps_path.read_bytes()
    for at in range(len(whole) - 1):
        journal.steps_path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert journal.finished(WORK) == {}


def test_a_damaged_journal_is_an_error(journal: Journal) -> None:
    journal.path.write_text("{")
    with pytest.raises(BundleError, match=r"journal\.json is not JSON"):
        journal.finished(WORK)
    with pytest.raises(BundleError, match=r"journal\.json is not JSON"):
        journal.variants()
