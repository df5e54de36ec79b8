"""Exports into a bundle that is there already."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import pipeline
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import recipe_for
from lowmem.errors import BundleError, InputError
from tests.bundles import assert_equal, tree, write_bundle
from tests.command_line import lowmem
from tests.models import CONTRACT, tiny_checkpoint


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of all variants, of which no byte is the source's."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def test_a_variant_that_is_there_is_checked_and_left(checkpoint: Path, bundle: Path) -> None:
    def identities() -> dict[Path, tuple[int, int]]:
        paths = [bundle, *bundle.rglob("*")]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = identities()
    manifest = write_bundle(checkpoint, bundle, ["int8", "int4"])
    assert manifest == Bundle(bundle).manifest
    assert identities() == before
    (bundle / "int4" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"int4 is not what was exported: int4/tokenizer\.json"):
        write_bundle(checkpoint, bundle, ["int8", "int4"])


def test_the_command_says_which_variants_stay(checkpoint: Path, tmp_path: Path) -> None:
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps(CONTRACT.to_json()))
    bundle, data_free = tmp_path / "bundle", ("--calibration", "none", "--reference-texts", "none")
    for variants, kept in (("int8", None), ("int8,int4", "int8"), ("int8,int4", "int8, int4")):
        words = ("--variants", variants, "--contract", contract, *data_free)
        said = lowmem("export", checkpoint, bundle, *words).stderr
        note = "there already, made alike, and kept; --force makes them anew"
        assert [line for line in said.splitlines() if note in line] == (
            [f"{kept}: {note}"] if kept else []
        )


def test_a_variant_that_can_have_no_graphs_lacks_none(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", head_dim=24).path
    for _ in range(2):
        manifest = write_bundle(checkpoint, tmp_path / "bundle", ["int8"], onnx=True)
        assert manifest.variants["int8"].graphs == {}


def test_a_variant_of_another_recipe_is_replaced_only_by_force(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_recipe(variant: str, dtype: str, calibration: str | None) -> dict[str, Any]:
        return recipe_for(variant, dtype, calibration) | {"scales": "another way"}

    before = tree(bundle)
    monkeypatch.setattr(pipeline, "recipe_for", other_recipe)
    with pytest.raises(InputError) as caught:
        write_bundle(checkpoint, bundle, ["int4"])
    assert str(caught.value) == (
        f"{bundle} already has a variant int4 that was made otherwise: --force replaces it"
    )
    assert_equal(tree(bundle), before)
    write_bundle(checkpoint, bundle, ["int4"], force=True)
    variants = Bundle(bundle).manifest.variants
    assert variants["int4"].recipe["scales"] == "another way"
    assert "scales" not in variants["int8"].recipe
    assert Bundle(bundle).verify() == ([], [])


@pytest.mark.parametrize("force", [False, True])
def test_another_source_or_contract_is_refused(
    force: bool, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "other" / "tiny", layers=2, seed=1).path
    before = tree(bundle)
    with pytest.raises(BundleError) as caught:
        write_bundle(other, bundle, ["int4"], force=force)
    assert str(caught.value) == (
        f"{bundle} was exported with another source: choose another directory"
    )
    contract = replace(CONTRACT, max_seq_length=64)
    with pytest.raises(BundleError) as caught:
        write_bundle(checkpoint, bundle, ["int4"], contract=contract, force=force)
    assert str(caught.value) == (
        f"{bundle} was exported with another contract: choose another directory"
    )
    assert_equal(tree(bundle), before)
