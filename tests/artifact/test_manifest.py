"""Bundles that are damaged, and manifests that are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.errors import BundleError
from tests.bundles import assert_equal, edit, tree, write_bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_damaged_byte_in_any_file_is_found_and_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, everywhere = Bundle(bundle), []
    for variant in VARIANTS:
        opened.check(variant)
        problems = []
        for name, entry in sorted(opened.variant(variant).files.items()):
            with (bundle / variant / name).open("r+b") as file:
                file.seek(entry.size * 2 // 3)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
            problem = f"{variant}/{name} is damaged: its sha256 is not that of the manifest"
            problems.append(problem)
        for cache in ("cache", "another machine's cache"):
            monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / cache))
            with pytest.raises(BundleError) as caught:
                opened.check(variant)
            expected = f"{variant} is not what was exported: " + "; ".join(problems)
            assert str(caught.value) == expected
        everywhere += problems
    assert opened.verify() == (sorted(everywhere), [])


def test_missing_shortened_and_grown_files_are_named_all_at_once(bundle: Path) -> None:
    weights, config = bundle / "int4" / "model.safetensors", bundle / "int4" / "config.json"
    size, config_size = weights.stat().st_size, config.stat().st_size
    os.truncate(weights, size - 1)
    with config.open("a") as file:
        file.write(" ")
    (bundle / "int4" / "modules.json").unlink()
    with pytest.raises(BundleError) as caught:
        Bundle(bundle).check("int4")
    assert str(caught.value) == (
        "int4 is not what was exported: "
        f"int4/config.json must have {config_size} bytes, got {config_size + 1}; "
        f"int4/model.safetensors must have {size} bytes, got {size - 1}; "
        "int4/modules.json cannot be read (No such file or directory)"
    )
    Bundle(bundle).check("int8")


def test_strays_are_named_and_reports_are_none(bundle: Path) -> None:
    for name in ("int4/extra.bin", "notes.txt", "reference/probe.npy", "reports/fp16.json"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("")
    assert Bundle(bundle).verify() == ([], ["int4/extra.bin", "notes.txt"])


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    file = bundle / "int4" / "config.json"
    file.rename(tmp_path / "outside.json")
    file.symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError) as caught:
        Bundle(bundle).check("int4")
    assert str(caught.value) == (
        "int4 is not what was exported: int4/config.json leads out of the bundle"
    )


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "./a", "a//b", "a/", "", ".", "..", "a\\b", "a\0b"]
)
def test_a_path_that_is_not_confined_is_refused(name: str, bundle: Path) -> None:
    variants = json.loads((bundle / "lowmem.json").read_text())["variants"]
    variants["int4"]["files"][name] = {"size": 1, "sha256": "0" * 64}
    edit(bundle, variants=variants)
    with pytest.raises(BundleError) as caught:
        Bundle(bundle)
    assert str(caught.value) == (
        f"a path must stay inside its variant, got {name!r} "
        f"({bundle / 'lowmem.json'}, variant int4)"
    )


@pytest.mark.parametrize("name", ["..", "../int4", "a/b", "/a", "", "reference", "reports"])
def test_a_variant_whose_name_is_no_plain_name_is_refused(name: str, bundle: Path) -> None:
    variants = json.loads((bundle / "lowmem.json").read_text())["variants"]
    edit(bundle, variants={name: variants["int4"]})
    with pytest.raises(BundleError) as caught:
        Bundle(bundle)
    assert str(caught.value) == (
        f"a variant's name must be a plain directory name, got {name!r} ({bundle / 'lowmem.json'})"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format must be 1, got 2 ({})"),
        ({"format": "1"}, "format must be 1, got '1' ({})"),
        ({"format": None}, "format must be 1, got None ({})"),
        ({"later": 1, "other": 2}, "unknown key 'later'; unknown key 'other' ({})"),
        ({"contract": None}, "missing key 'contract' ({})"),
        ({"variants": []}, "variants must be an object ({})"),
        ({"source": {}}, "source.name must be a string ({})"),
        ({"source": {"name": "a", "sha256": 5}}, "source.sha256 must be a string ({})"),
        (
            {"source": {"name": "a", "sha256": "b", "revision": []}},
            "source.revision must be a string or null ({})",
        ),
        ({"variants": {"int4": 1}}, "a variant must be an object ({}, variant int4)"),
        (
            {"variants": {"int4": {}}},
            "missing key 'bits_per_weight'; missing key 'files'; missing key 'graphs'; "
            "missing key 'modules'; missing key 'recipe' ({}, variant int4)",
        ),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    changes: dict[str, Any], text: str, tiny_bundle: Path, bundle: Path
) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError) as caught:
        Bundle(bundle)
    assert str(caught.value) == text.format(bundle / "lowmem.json")
    before = tree(bundle)
    with pytest.raises(BundleError):
        write_bundle(tiny_bundle.parent / "checkpoint", bundle, ["int4"], force=True)
    assert_equal(tree(bundle), before)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bits_per_weight", {}, "bits_per_weight must be numbers for linears and model"),
        ("bits_per_weight", {"linears": "4", "model": 5}, "bits_per_weight must be numbers"),
        ("graphs", {"config.json": [1]}, r"a graph's compute must be a string, got \[1\]"),
        ("modules", {"layers.0.mlp": {"bits": None, "error": 1}}, "bits and error must be numbers"),
    ],
)
def test_what_a_variant_says_of_itself_has_its_type(
    key: str, value: Any, text: str, bundle: Path
) -> None:
    variants = json.loads((bundle / "lowmem.json").read_text())["variants"]
    variants["int4"][key] = value
    edit(bundle, variants=variants)
    with pytest.raises(BundleError, match=text):
        Bundle(bundle)


def test_weights_that_were_not_exported_are_not_taken_for_those_that_were(bundle: Path) -> None:
    shutil.copy(bundle / "int8" / "model.safetensors", bundle / "fp16" / "other.safetensors")
    with pytest.raises(BundleError, match=r"fp16/other\.safetensors is not among the files that"):
        Bundle(bundle).check("fp16")


def test_a_loop_of_links_is_a_file_that_cannot_be_read(bundle: Path) -> None:
    file = bundle / "int4" / "config.json"
    file.unlink()
    file.symlink_to(bundle / "int4" / "loop")
    (bundle / "int4" / "loop").symlink_to(file)
    with pytest.raises(BundleError, match=r"int4/config\.json cannot be read"):
        Bundle(bundle).check("int4")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(bundle: Path) -> None:
    file = bundle / "int4" / "config.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match=r"int4/config\.json must be a regular file"):
        Bundle(bundle).check("int4")
