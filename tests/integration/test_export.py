"""A checkpoint becomes a bundle: the same bytes each time, with the weights of its source."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from export import linking
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.weights import Checkpoint
from lowmem.errors import BundleError, InputError
from tests.bundles import assert_equal, assert_nothing_in, tree, write_bundle
from tests.models import BOS, CONTRACT, EOS, tiny_checkpoint


def test_exporting_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    variants = ("fp16", "int8", "int4")
    write_bundle(checkpoint, tmp_path / "first", variants, onnx=True)
    write_bundle(elsewhere, tmp_path / "second", variants[::-1], onnx=True, copy=True)
    first = tree(tmp_path / "first")
    assert {name.rpartition(".")[2] for name in first} == {"json", "onnx", "safetensors"}
    assert_equal(tree(tmp_path / "second"), first)


def test_adding_variants_one_by_one_gives_the_bytes_of_all_at_once(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    for variant in reversed(VARIANTS):
        write_bundle(checkpoint, tmp_path / "bundle", [variant])
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
    manifest = write_bundle(checkpoint, tmp_path / "named", ["fp16"], model="linq")
    assert manifest.source["model"] == Bundle(tmp_path / "named").manifest.source["model"] == "linq"
    assert write_bundle(checkpoint, tmp_path / "unnamed", ["fp16"]).source["model"] is None
    with pytest.raises(BundleError, match="was exported as linq, not sfr: choose another"):
        write_bundle(checkpoint, tmp_path / "named", ["int8"], model="sfr")
    assert write_bundle(checkpoint, tmp_path / "named", ["int8"]).source["model"] == "linq"


def test_pooling_over_latents_is_refused_without_latents(checkpoint: Path, tmp_path: Path) -> None:
    contract = replace(CONTRACT, pooling="latent_attention", is_causal=False)
    with pytest.raises(InputError, match="latent_attention and a model with no weights for it"):
        write_bundle(checkpoint, tmp_path / "bundle", ["fp16"], contract=contract)
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
        ("<s> $A", "tokenizer.json puts no EOS (2) behind"),
        ("$A </s>", "tokenizer.json puts no BOS (1) in front"),
        ("$A", "tokenizer.json puts no BOS (1) in front and no EOS (2) behind"),
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
    write_bundle(source, tmp_path / "bundle", ["fp16"])
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
    write_bundle(source, tmp_path / "bundle", ["fp16"])
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
    write_bundle(checkpoint, tmp_path / "bundle", ["fp16"])
    found, source = Checkpoint(tmp_path / "bundle" / "fp16"), Checkpoint(checkpoint)
    assert found.tensors.keys() == source.tensors.keys() - {"lm_head.weight"}
    for name, tensor in found.tensors.items():
        assert tensor.dtype == "F16"
        expected = source.tensors[name].read().array.astype(np.float16)
        np.testing.assert_array_equal(tensor.read().array, expected, strict=True)


def test_a_bfloat16_source_stays_bfloat16(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, layers=1).path
    manifest = write_bundle(checkpoint, tmp_path / "bundle", VARIANTS)
    for variant in VARIANTS:
        assert Checkpoint(tmp_path / "bundle" / variant).dtype == "BF16"
        assert manifest.variants[variant].recipe["dtype"] == "BF16"
        config = json.loads((tmp_path / "bundle" / variant / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_float16_files_are_those_of_the_source_unless_a_copy_is_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    write_bundle(checkpoint, tmp_path / "linked", ["fp16"])
    write_bundle(checkpoint, tmp_path / "copied", ["fp16"], copy=True)
    for shard in checkpoint.glob("*.safetensors"):
        assert (tmp_path / "linked" / "fp16" / shard.name).samefile(shard)
        assert not (tmp_path / "copied" / "fp16" / shard.name).samefile(shard)
    assert_equal(tree(tmp_path / "linked"), tree(tmp_path / "copied"))


def test_an_unknown_variant_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_bundle(checkpoint, tmp_path / "bundle", ["int4", "int3"])
    assert str(caught.value) == (
        "a variant must be one of fp16, int8, int4, bnb-int8, bnb-nf4, or int4-BITS with BITS "
        "from 4.5 to 8.25, got 'int3'"
    )
    assert_nothing_in(tmp_path / "bundle")


def test_a_tokenizer_whose_special_token_is_nowhere_is_noted_and_mended(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tokenizer_with(checkpoint, tmp_path / "source", "$A </s>")
    path = source / "tokenizer.json"
    value = json.loads(path.read_text())
    value["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(value))
    write_bundle(source, tmp_path / "bundle", ["fp16"])
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("source: the post_processor of tokenizer.json contradicts itself; ")
    written = Tokenizer.from_file(str(tmp_path / "bundle" / "fp16" / "tokenizer.json"))
    assert written.encode("fox").ids[-1] == EOS
