"""Records are of the commit that they name."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def record(script_named: Callable[[str], ModuleType]) -> ModuleType:
    return script_named("record")


@pytest.mark.parametrize("made_of", ["", "another commit"])
def test_a_demo_of_another_commit_makes_no_record(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_of: str
) -> None:
    (tmp_path / record.DEMO_COMMIT).write_text(made_of)
    monkeypatch.setattr(record, "commit", lambda: "this commit")
    monkeypatch.setattr("sys.argv", ["record.py", str(tmp_path), "demo"])
    with pytest.raises(SystemExit, match="the demo was made of another commit"):
        record.main()


def test_changed_files_make_no_record(record: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "commit", lambda: None)
    with pytest.raises(SystemExit, match="a record names a commit: commit or remove your changes"):
        record.head("demo", "make demo")
