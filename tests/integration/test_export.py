"""A checkpoint becomes a bundle: the same bytes each time, all of it or nothing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from export import linking, pipeline
from export.pipeline import export
from export.sources import open_source
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle, Manifest, file_sha256
from lowmem.artifact.tensors import read_header
from lowmem.artifact.variants import VARIANTS, recipe_for
from lowmem.artifact.weights import Checkpoint
from lowmem.errors import BundleError, CapacityError, InputError
from tests.models import BOS, CONTRACT, EOS, tiny_checkpoint

Tree = dict[str, bytes]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2, layers=2).path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants; not to be changed."""
    path = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path / "cache"))
        write(checkpoint, path / "bundle", VARIANTS)
    return path / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of all variants, of which no byte is the source's."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def write(checkpoint: Path, bundle: Path, variants: Sequence[str], **options: Any) -> Manifest:
    source = open_source(checkpoint)
    return export(source, bundle, CONTRACT, **{"variants": variants, "onnx": False} | options)


def tree(path: Path) -> Tree:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def assert_equal(found: Tree, expected: Tree) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def assert_nothing_in(path: Path) -> None:
    assert not path.exists() or list(path.iterdir()) == []


# Equal inputs, equal bytes.


def test_exporting_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    variants = ("fp16", "int8", "int4")
    write(checkpoint, tmp_path / "first", variants, onnx=True)
    write(elsewhere, tmp_path / "second", variants[::-1], onnx=True, copy=True)
    first = tree(tmp_path / "first")
    assert {name.rpartition(".")[2] for name in first} == {"json", "onnx", "safetensors"}
    assert_equal(tree(tmp_path / "second"), first)


def test_adding_variants_one_by_one_gives_the_bytes_of_all_at_once(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    for variant in reversed(VARIANTS):
        write(checkpoint, tmp_path / "bundle", [variant])
        assert Bundle(tmp_path / "bundle").verify() == ([], [])
    assert_equal(tree(tmp_path / "bundle"), tree(exported))


def test_nothing_of_the_machine_is_in_the_manifest(exported: Path, tmp_path: Path) -> None:
    text = (exported / "lowmem.json").read_text()
    assert str(tmp_path.parent) not in text
    assert os.uname().nodename not in text
    value = json.loads(text)
    assert set(value["source"]) == {"name", "sha256", "revision", "model"}
    assert value["source"]["name"] == "tiny"


def test_the_manifest_names_the_known_model(checkpoint: Path, tmp_path: Path) -> None:
    manifest = write(checkpoint, tmp_path / "named", ["fp16"], model="linq")
    assert manifest.source["model"] == Bundle(tmp_path / "named").manifest.source["model"] == "linq"
    assert write(checkpoint, tmp_path / "unnamed", ["fp16"]).source["model"] is None
    with pytest.raises(BundleError, match="was exported as linq, not sfr: choose another"):
        write(checkpoint, tmp_path / "named", ["int8"], model="sfr")
    assert write(checkpoint, tmp_path / "named", ["int8"]).source["model"] == "linq"


def test_pooling_over_latents_is_refused_without_latents(checkpoint: Path, tmp_path: Path) -> None:
    contract = replace(CONTRACT, pooling="latent_attention", is_causal=False)
    with pytest.raises(InputError, match="latent_attention and a model with no weights for it"):
        export(open_source(checkpoint), tmp_path / "bundle", contract, variants=["fp16"])
    assert_nothing_in(tmp_path / "bundle")


def tokenizer_with(checkpoint: Path, path: Path, template: str) -> Path:
    """A copy of a checkpoint whose tokenizer.json adds special tokens by itself."""
    copy = Path(shutil.copytree(checkpoint, path))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("<s> $A", "tokenizer.json loses EOS (2)"),
        ("$A </s>", "tokenizer.json loses BOS (1)"),
        ("$A", "tokenizer.json loses BOS (1) and loses EOS (2)"),
        ("<s> <s> $A </s>", "tokenizer.json adds tokens that the contract has not"),
    ],
)
def test_a_tokenizer_that_loses_a_special_token_is_noted_and_mended(
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    template: str,
    note: str,
) -> None:
    source = tokenizer_with(checkpoint, tmp_path / "source", template)
    write(source, tmp_path / "bundle", ["fp16"])
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        f"source: {note}; the bundle follows its contract, and so do the tokenizers in it"
    )
    written = Tokenizer.from_file(str(tmp_path / "bundle" / "fp16" / "tokenizer.json"))
    assert written.encode("fox").ids == [
        BOS,
        *written.encode("fox", add_special_tokens=False).ids,
        EOS,
    ]


def test_a_tokenizer_that_agrees_with_the_contract_is_not_noted(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tokenizer_with(checkpoint, tmp_path / "source", "<s> $A </s>")
    write(source, tmp_path / "bundle", ["fp16"])
    assert caplog.records == []


def test_every_variant_opens_with_the_weights_of_the_source(
    checkpoint: Path, exported: Path
) -> None:
    source = Checkpoint(checkpoint)
    for variant in VARIANTS:
        opened = Checkpoint(exported / variant)
        assert opened.config == source.config
        assert opened.dtype == "F16"
        for raw, expected in (
            (opened.embedding(), source.embedding()),
            (opened.final_norm(), source.final_norm()),
        ):
            np.testing.assert_array_equal(raw.array, expected.array, strict=True)
        for layer, original in zip(opened.layers(), source.layers(), strict=True):
            for name, norm in original.norms.items():
                np.testing.assert_array_equal(layer.norms[name].array, norm.array, strict=True)
            for name, linear in original.linears.items():
                weight = linear.tensors["weight"].float32()
                found = layer.linears[name]
                error = found.format.dequantize(found.tensors) - weight
                limit = {"fp16": 0, "int8": 0.01, "bnb-int8": 0.01}.get(variant, 0.12)
                assert np.linalg.norm(error) <= limit * np.linalg.norm(weight), (variant, name)


def test_a_float32_source_is_rounded_once_to_float16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.float32, layers=1).path
    write(checkpoint, tmp_path / "bundle", ["fp16"])
    found, source = Checkpoint(tmp_path / "bundle" / "fp16"), Checkpoint(checkpoint)
    assert found.tensors.keys() == source.tensors.keys() - {"lm_head.weight"}
    for name, tensor in found.tensors.items():
        assert tensor.dtype == "F16"
        expected = source.tensors[name].read().array.astype(np.float16)
        np.testing.assert_array_equal(tensor.read().array, expected, strict=True)


def test_a_bfloat16_source_stays_bfloat16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, layers=1).path
    manifest = write(checkpoint, tmp_path / "bundle", VARIANTS)
    for variant in VARIANTS:
        assert Checkpoint(tmp_path / "bundle" / variant).dtype == "BF16"
        assert manifest.variants[variant].recipe["dtype"] == "BF16"
        config = json.loads((tmp_path / "bundle" / variant / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_float16_files_are_those_of_the_source_unless_a_copy_is_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    write(checkpoint, tmp_path / "linked", ["fp16"])
    write(checkpoint, tmp_path / "copied", ["fp16"], copy=True)
    for shard in checkpoint.glob("*.safetensors"):
        assert (tmp_path / "linked" / "fp16" / shard.name).samefile(shard)
        assert not (tmp_path / "copied" / "fp16" / shard.name).samefile(shard)
    assert_equal(tree(tmp_path / "linked"), tree(tmp_path / "copied"))


# A bundle that is there already.


def test_a_variant_that_is_there_is_checked_and_left(checkpoint: Path, bundle: Path) -> None:
    def identities() -> dict[Path, tuple[int, int]]:
        paths = [bundle, *bundle.rglob("*")]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = identities()
    manifest = write(checkpoint, bundle, ["int8", "int4"])
    assert manifest == Bundle(bundle).manifest
    assert identities() == before
    (bundle / "int4" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"int4 is not what was exported: int4/tokenizer\.json"):
        write(checkpoint, bundle, ["int8", "int4"])


def test_a_variant_of_another_recipe_is_replaced_only_by_force(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_recipe(variant: str, dtype: str, calibration: str | None) -> dict[str, Any]:
        return recipe_for(variant, dtype, calibration) | {"scales": "another way"}

    before = tree(bundle)
    monkeypatch.setattr(pipeline, "recipe_for", other_recipe)
    with pytest.raises(InputError) as caught:
        write(checkpoint, bundle, ["int4"])
    assert str(caught.value) == (
        f"{bundle} already has a variant int4 that was made otherwise: --force replaces it"
    )
    assert_equal(tree(bundle), before)
    write(checkpoint, bundle, ["int4"], force=True)
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
        write(other, bundle, ["int4"], force=force)
    assert str(caught.value) == (
        f"{bundle} was exported with another source: choose another directory"
    )
    contract = replace(CONTRACT, max_seq_length=64)
    with pytest.raises(BundleError) as caught:
        export(
            open_source(checkpoint),
            bundle,
            contract,
            variants=["int4"],
            onnx=False,
            force=force,
        )
    assert str(caught.value) == (
        f"{bundle} was exported with another contract: choose another directory"
    )
    assert_equal(tree(bundle), before)


def test_an_unknown_variant_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write(checkpoint, tmp_path / "bundle", ["int4", "int3"])
    assert str(caught.value) == (
        "a variant must be one of fp16, int8, int4, bnb-int8, bnb-nf4, or int4-BITS with BITS "
        "from 4.25 to 8.25, got 'int3'"
    )
    assert_nothing_in(tmp_path / "bundle")


# Damage.


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


def edit(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "lowmem.json").read_text())
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    (bundle / "lowmem.json").write_text(strict_json.dumps(manifest))


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
        ({"variants": {"int4": 1}}, "a variant must be an object ({}, variant int4)"),
        (
            {"variants": {"int4": {}}},
            "missing key 'bits_per_weight'; missing key 'files'; missing key 'graphs'; "
            "missing key 'modules'; missing key 'recipe' ({}, variant int4)",
        ),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    changes: dict[str, Any], text: str, checkpoint: Path, bundle: Path
) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError) as caught:
        Bundle(bundle)
    assert str(caught.value) == text.format(bundle / "lowmem.json")
    before = tree(bundle)
    with pytest.raises(BundleError):
        write(checkpoint, bundle, ["int4"], force=True)
    assert_equal(tree(bundle), before)


# Sources that are damaged, and disks that are full.


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layers.1.mlp.down_proj"),
        ("model.layers.0.input_layernorm.weight", "layers.0.input_layernorm.weight"),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_one_error_and_no_bundle(
    tensor: str, place: str, value: float, checkpoint: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
    _set_last_value(damaged, tensor, np.float16(value).tobytes())
    for variants in (VARIANTS, ["fp16"]):
        with pytest.raises(BundleError) as caught:
            write(damaged, tmp_path / "bundle", variants)
        assert str(caught.value) == f"a weight must be finite and fit float16 ({place})"
        assert_nothing_in(tmp_path / "bundle")


def test_a_weight_that_float16_cannot_hold_is_one_error_and_no_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.float32, layers=1).path
    tensor = "model.layers.0.self_attn.o_proj.weight"
    _set_last_value(checkpoint, tensor, np.float32(65520).tobytes())
    with pytest.raises(BundleError) as caught:
        write(checkpoint, tmp_path / "bundle", ["fp16"])
    assert str(caught.value) == (
        "a weight must be finite and fit float16 (layers.0.self_attn.o_proj)"
    )
    assert_nothing_in(tmp_path / "bundle")


def test_a_truncated_shard_is_an_error_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
    shard = sorted(damaged.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(BundleError) as caught:
        write(damaged, tmp_path / "bundle", VARIANTS)
    assert str(caught.value) == (
        f"{shard} must be {size} bytes long by its header, got {size - 100}: it is truncated"
    )
    assert_nothing_in(tmp_path / "bundle")


def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    bundle = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CapacityError, match=r"^the disk is full: .*safetensors needs \d+ byte"):
            write(checkpoint, bundle, VARIANTS)
    assert_nothing_in(bundle)
    write(checkpoint, bundle, ["fp16"])
    before = tree(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CapacityError, match="the disk is full"):
            write(checkpoint, bundle, ["int4"])
    assert_equal(tree(bundle), before)


def test_a_disk_with_too_little_room_is_known_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**26))
    with pytest.raises(CapacityError, match=rf"bytes of disk, {2**26} are free"):
        write(checkpoint, tmp_path / "bundle", VARIANTS)
    assert_nothing_in(tmp_path / "bundle")


def test_an_interrupted_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, tmp_path / "bundle", VARIANTS, progress=interrupt)
    assert_nothing_in(tmp_path / "bundle")


# Killed exports: a process that has not computed yet forks for each of them, and the fork ends
# itself in front of one of the calls that change the disk.

_KILLER = """
import json, os, shutil, sys
from pathlib import Path
from export import pipeline
from export.sources import open_source
from lowmem import cache
from lowmem.artifact.contract import parse_contract
from lowmem.artifact.variants import recipe_for

CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "truncate", "posix_fallocate")
CALLS += ("pwrite", "fdatasync")
# So that every run makes the same calls.
cache.remember_sha256 = lambda *arguments, **options: None

def run(bundle, last):
    import torch
    torch.set_num_threads(1)
    made = 0
    def counted(call):
        def wrapper(*arguments, **options):
            nonlocal made
            if made == last:
                os._exit(9)
            made += 1
            return call(*arguments, **options)
        return wrapper
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    if force:
        pipeline.recipe_for = lambda *arguments: recipe_for(*arguments) | {"scales": "other"}
    source = open_source(Path(job["checkpoint"]))
    contract = parse_contract(job["contract"], "contract")
    pipeline.export(source, bundle, contract, variants=variants, onnx=False, force=force)
    return made

def child(name, last):
    bundle = into / name
    if before:
        shutil.copytree(before, bundle)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(run(bundle, last)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        made = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if last < 0 else 9), (name, status)
    return made

job = json.load(sys.stdin)
for scenario in job["scenarios"]:
    before, variants, force = (scenario[key] for key in ("before", "variants", "force"))
    into = Path(scenario["into"])
    made = int(child("whole", -1))
    # The last quarter of the calls publishes and cleans up: more of the points lie there.
    late, points = made * 3 // 4, job["points"]
    steps = {round(late * i / 4) for i in range(4)}
    steps |= {round(late + (made - late) * i / (points - 4)) for i in range(points - 4)}
    for step in sorted(steps):
        child(f"killed-at-{step}", step)
"""
_POINTS = 12
FIRST = ["fp16", "int8", "bnb-nf4"]


@pytest.fixture(scope="module")
def killed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories ``first``, ``addition`` and ``replacement``.

    Each holds ``before`` (but for the first), the same bundle after a ``whole`` export, and after
    exports that were ``killed-at-…`` a step.
    """
    path = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path / "cache"))
        write(checkpoint, path / "addition" / "before", ["fp16", "int8"])
        replaced = path / "replacement" / "before"
        write(checkpoint, replaced, ["int8", "int4"])
        # As an older version might have written it.
        with (replaced / "int4" / "config.json").open("a") as file:
            file.write("\n")
        variants = json.loads((replaced / "lowmem.json").read_text())["variants"]
        config = replaced / "int4" / "config.json"
        entry = {"size": config.stat().st_size, "sha256": file_sha256(config)}
        variants["int4"]["files"]["config.json"] = entry
        edit(replaced, variants=variants)
        scenarios = [
            {"into": "first", "before": None, "variants": FIRST, "force": False},
            {"into": "addition", "before": "before", "variants": ["int4"], "force": False},
            {"into": "replacement", "before": "before", "variants": ["int4"], "force": True},
        ]
        for scenario in scenarios:
            into = scenario["into"] = str(path / str(scenario["into"]))
            scenario["before"] = scenario["before"] and f"{into}/before"
        job = {
            "checkpoint": str(checkpoint),
            "contract": CONTRACT.to_json(),
            "points": _POINTS,
            "scenarios": scenarios,
        }
        command = [sys.executable, "-c", _KILLER]
        subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=300)
    return path


def in_order_of_death(path: Path) -> list[Path]:
    bundles = sorted(path.glob("killed-at-*"), key=lambda path: int(path.name.split("-")[2]))
    assert len(bundles) >= _POINTS - 3
    return bundles


def test_a_killed_first_export_leaves_nothing_that_loads_and_can_be_repeated(
    checkpoint: Path, killed: Path
) -> None:
    expected = tree(killed / "first" / "whole")
    loads = []
    for bundle in in_order_of_death(killed / "first"):
        loads.append((bundle / "lowmem.json").exists())
        if loads[-1]:
            assert Bundle(bundle).verify()[0] == []
        for variant in FIRST:  # a directory with a variant's name holds all of it
            files = tree(bundle / variant)
            assert files in ({}, _below(expected, variant))
        write(checkpoint, bundle, FIRST)
        assert_equal(tree(bundle), expected)
    assert not loads[0]
    assert loads[-1]
    assert loads == sorted(loads)


def test_a_killed_addition_leaves_the_bundle_as_it_was_and_can_be_repeated(
    checkpoint: Path, killed: Path
) -> None:
    expected = tree(killed / "addition" / "whole")
    for bundle in in_order_of_death(killed / "addition"):
        (bundle / "reports").mkdir()
        (bundle / "reports" / "mine.json").write_text("{}")
        opened = Bundle(bundle)
        assert opened.verify()[0] == []
        assert set(opened.manifest.variants) - {"int4"} == {"fp16", "int8"}
        write(checkpoint, bundle, ["int4"])
        assert_equal(tree(bundle), expected | {"reports/mine.json": b"{}"})


def test_a_killed_replacement_never_loads_as_half_and_ends_as_either_whole(
    checkpoint: Path, killed: Path
) -> None:
    old, new = tree(killed / "replacement" / "before"), tree(killed / "replacement" / "whole")
    assert old["int4/config.json"] == new["int4/config.json"] + b"\n"
    ends = []
    for bundle in in_order_of_death(killed / "replacement"):
        config = bundle / "int4" / "config.json"
        with contextlib.suppress(BundleError):
            Bundle(bundle).check("int4")
            is_new = "other" in (bundle / "lowmem.json").read_text()
            assert config.read_bytes() == (new if is_new else old)["int4/config.json"]
        write(checkpoint, bundle, ["int8"])  # any export puts things right
        ends.append(tree(bundle) == new)
        if not ends[-1]:
            assert_equal(tree(bundle), old)
    assert not ends[0]
    assert ends[-1]
    assert ends == sorted(ends)


def _below(files: Tree, directory: str) -> Tree:
    return {
        name.removeprefix(f"{directory}/"): content
        for name, content in files.items()
        if name.startswith(f"{directory}/")
    }


def _set_last_value(checkpoint: Path, tensor: str, value: bytes) -> None:
    for shard in checkpoint.glob("*.safetensors"):
        stored = read_header(shard).get(tensor)
        if stored is not None:
            with shard.open("r+b") as file:
                file.seek(stored.offset + stored.nbytes - len(value))
                file.write(value)
            return
    raise AssertionError(tensor)
