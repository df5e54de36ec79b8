import hashlib
import io
import json
import shutil

import numpy as np
import pytest

from lowmem import data
from lowmem.artifact.manifest import Bundle
from lowmem.cli import export as export_command
from lowmem.errors import BundleError
from lowmem.fidelity import parts as parts_module
from lowmem.fidelity import reference, stored_reference
from lowmem.fidelity.npy_files import npy_bytes
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.reference import Reference

ROWS = tuple(data.Row(str(n), f"text {n}") for n in range(5))
WHOLE = Reference(
    "mine.txt",
    ROWS,
    (9, 20, 20, 3, 20),
    3,
    np.arange(20, dtype=np.float32).reshape(5, 4),
    "a" * 64,
)


def test_a_part_has_the_vectors_and_an_identity_of_its_own() -> None:
    part = WHOLE.part([1, 3])
    assert part.rows == (ROWS[1], ROWS[3])
    assert part.tokens == (20, 3)
    assert part.vectors.tolist() == WHOLE.vectors[[1, 3]].tolist()
    assert part.texts_sha256 == data.sha256(part.rows) != WHOLE.texts_sha256
    assert part.sha256 != WHOLE.sha256
    assert (part.name, part.all_texts) == ("mine.txt", 5)


def test_a_part_counts_its_own_texts_that_were_cut() -> None:
    assert WHOLE.part([0, 1, 3]).truncated == 1
    assert Reference("x", ROWS, WHOLE.tokens, 0, WHOLE.vectors, "").part([1]).truncated == 0


def test_a_part_of_everything_is_the_whole() -> None:
    assert WHOLE.part(range(5)) is WHOLE


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy that may be changed."""
    return Bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def computed(monkeypatch):
    """Names of the texts whose vectors were computed, which takes no time here."""
    names = []

    def compute(bundle, name, rows, *_):
        names.append(name)
        return made(name, rows)

    monkeypatch.setattr(reference, "compute", compute)
    return names


def made(name, rows=None):
    rows = data.load(name) if rows is None else rows
    vectors = zeros(len(rows))
    digest = hashlib.sha256(npy_bytes(vectors)).hexdigest()
    return Reference(name, tuple(rows), (5,) * len(rows), 0, vectors, digest)


def zeros(texts):
    return np.zeros((texts, 4), np.float32)


def age(bundle, name):
    """Makes a stored set one of an earlier fp16."""
    path = bundle.path / "reference" / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "artifact_sha256": "0" * 64}))


def files(bundle):
    return sorted(path.name for path in (bundle.path / "reference").iterdir())


def test_a_new_set_takes_the_place_of_the_other(bundle):
    stored_reference.write(bundle, made("probe"))
    age(bundle, "probe")
    with pytest.raises(BundleError, match=r"are of another fp16 .*: export again"):
        stored_reference.read(bundle)
    stored_reference.write(bundle, made("quick"))
    assert files(bundle) == ["quick.json", "quick.npy"]
    assert stored_reference.read(bundle).name == "quick"
    stored_reference.write(bundle, made("probe"))
    assert files(bundle) == ["probe.json", "probe.npy"]


def test_the_other_set_is_there_until_the_new_one_stands(bundle, monkeypatch):
    stored_reference.write(bundle, made("probe"))
    monkeypatch.setattr(reference.cache, "replacing", full)
    with pytest.raises(OSError, match="full"):
        stored_reference.write(bundle, made("quick"))
    assert stored_reference.read(bundle).name == "probe"


def full(path):
    raise OSError("full")


def test_an_export_where_probe_is_slow_keeps_a_probe_that_is_there(bundle, computed, monkeypatch):
    monkeypatch.setattr(reference, "built_in_texts", lambda config: "quick")
    stored_reference.write(bundle, made("probe"))
    export_command._write_reference(bundle, "auto")
    assert (computed, files(bundle)) == ([], ["probe.json", "probe.npy"])
    age(bundle, "probe")
    export_command._write_reference(bundle, "auto")
    assert (computed, files(bundle)) == (["quick"], ["quick.json", "quick.npy"])


def test_an_export_makes_the_texts_that_are_asked_for(bundle, computed, monkeypatch):
    monkeypatch.setattr(reference, "built_in_texts", lambda config: "probe")
    for wanted, name in (("probe", "probe"), ("quick", "quick"), ("auto", "probe")):
        export_command._write_reference(bundle, wanted)
        export_command._write_reference(bundle, wanted)
        assert stored_reference.read(bundle).name == name
    assert computed == ["probe", "quick", "probe"]


def test_own_texts_are_computed_once_by_each_version(bundle, computed, monkeypatch):
    def own():
        return reference.of_own_texts(bundle, "mine.txt", ROWS, 1, Parts())

    assert own().vectors.tolist() == own().vectors.tolist() == zeros(len(ROWS)).tolist()
    assert len(computed) == 1
    monkeypatch.setattr(parts_module, "package_versions", lambda: {"torch": "another"})
    own()
    assert len(computed) == 2
    monkeypatch.setattr(parts_module, "_code_sha256", lambda: "edited")
    own()
    own()
    assert len(computed) == 3


def test_own_texts_whose_cache_is_damaged_are_computed_again(bundle, computed, cache_directory):
    def own():
        return reference.of_own_texts(bundle, "mine.txt", ROWS, 1, Parts())

    own()
    (about,) = cache_directory.glob("reference-*.json")
    about.write_text(json.dumps({"sha256": json.loads(about.read_text())["sha256"]}))
    own()
    assert len(computed) == 2
    (vectors,) = (cache_directory / "references").glob("*.npy")
    vectors.unlink()
    vectors.mkdir()
    assert own().vectors.tolist() == zeros(len(ROWS)).tolist()
    assert len(computed) == 3


@pytest.mark.parametrize("texts", [[], {}, {"tokens": 5, "truncated": 0}, {"tokens": ["a"]}])
def test_a_reference_that_says_nothing_of_its_texts_is_made_again(bundle, computed, texts):
    stored_reference.write(bundle, made("quick"))
    path = bundle.path / "reference" / "quick.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "texts": texts}))
    with pytest.raises(BundleError, match="texts must be an object with sha256, tokens and trunc"):
        stored_reference.read(bundle)
    export_command._write_reference(bundle, "quick")
    assert computed == ["quick"]


def header_of(shape):
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array at all", r"quick\.npy is no \.npy file"),
        (
            header_of((64, 10**12)),
            r"must hold 64 float32 vectors, got float32 \(64, 1000000000000\)",
        ),
        (npy_bytes(zeros(63)), r"must hold 64 float32 vectors, got float32 \(63, 4\)"),
    ],
)
def test_vectors_that_cannot_be_those_of_the_texts_are_refused_unread(bundle, content, message):
    stored_reference.write(bundle, made("quick"))
    folder = bundle.path / "reference"
    (folder / "quick.npy").write_bytes(content)
    about = json.loads((folder / "quick.json").read_text())
    about["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "quick.json").write_text(json.dumps(about))
    with pytest.raises(BundleError, match=message):
        stored_reference.read(bundle)
