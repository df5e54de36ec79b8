from dataclasses import dataclass
from pathlib import Path

import pytest

from export import licences
from export.pipeline import export
from export.sources import open_source
from lowmem.errors import InputError
from tests.models import CONTRACT, tiny_checkpoint


@dataclass
class Reader:
    """Accepts some licences, and remembers which it was asked about."""

    accepted: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    def __call__(self, licence: str) -> bool:
        self.asked += (licence,)
        return licence in self.accepted


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    (path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return path


@pytest.mark.parametrize(
    "licence", [None, "mit", "apache-2.0", "Apache-2.0", "MIT", "ncsa", "cc-by-4.0", "mit, isc"]
)
def test_nobody_is_asked_about_a_permissive_licence_or_none(licence: str | None) -> None:
    reader = Reader()
    licences.check(licence, reader, "m")
    assert reader.asked == ()


@pytest.mark.parametrize(
    "licence",
    """cc-by-nc-4.0 CC-BY-NC-SA-4.0 cc-by-nd-4.0 other unknown llama3 gemma openrail agpl-3.0
    mit-like [mit,cc-by-nc-4.0]""".split(),
)
def test_every_other_licence_is_asked_about_by_its_name(licence: str) -> None:
    reader = Reader(accepted=(licence,))
    licences.check(licence, reader, "m")
    assert reader.asked == (licence,)
    with pytest.raises(InputError):
        licences.check(licence, licences.accepts_none, "m")


def test_of_several_licences_each_must_be_accepted() -> None:
    reader = Reader(accepted=("llama3",))
    with pytest.raises(InputError) as caught:
        licences.check("mit, llama3, cc-by-nc-4.0, own \x1b[1m", reader, "ORG/NAME")
    assert reader.asked == ("llama3", "cc-by-nc-4.0", "own \x1b[1m")
    assert str(caught.value) == (
        "the licence of ORG/NAME, 'cc-by-nc-4.0', 'own \\x1b[1m', may not permit every use: read "
        "it, and accept it with --accept-licence 'cc-by-nc-4.0' --accept-licence 'own \\x1b[1m'"
    )


def test_a_directory_is_asked_about_like_a_hub_id(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"the licence of tiny, 'cc-by-nc-4\.0', may not permit"):
        open_source(checkpoint)
    source = open_source(checkpoint, accepts_licence=Reader(("cc-by-nc-4.0",)))
    assert source.licence == "cc-by-nc-4.0"


def test_export_writes_nothing_without_acceptance_and_the_licence_with_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    accepts = Reader(("cc-by-nc-4.0",))
    source = open_source(checkpoint, accepts_licence=accepts)
    with pytest.raises(InputError, match=r"accept it with --accept-licence 'cc-by-nc-4\.0'"):
        export(source, tmp_path / "bundle", CONTRACT, variants=["int8"], onnx=False)
    assert not (tmp_path / "bundle").exists()
    manifest = export(
        *(source, tmp_path / "bundle", CONTRACT),
        variants=["int8"],
        onnx=False,
        accepts_licence=accepts,
    )
    assert manifest.licence == "cc-by-nc-4.0"
