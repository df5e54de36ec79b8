"""Sources that are damaged, or change during an export: one error, and no bundle."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export import identity, linking
from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.tensors import read_header
from lowmem.artifact.variants import VARIANTS
from lowmem.errors import BundleError
from tests.bidirectional import tiny_nvembed
from tests.bundles import assert_nothing_in, tree, write_bundle
from tests.models import CONTRACT, tiny_checkpoint


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
    tensor: str, place: str, value: float, own_checkpoint: Path, tmp_path: Path
) -> None:
    _set_last_value(own_checkpoint, tensor, np.float16(value).tobytes())
    for variants in (VARIANTS, ["fp16"]):
        with pytest.raises(BundleError) as caught:
            write_bundle(own_checkpoint, tmp_path / "bundle", variants)
        assert str(caught.value) == f"a weight must be finite and fit float16 ({place})"
        assert_nothing_in(tmp_path / "bundle")


def test_a_weight_that_float16_cannot_hold_is_one_error_and_no_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.float32, layers=1).path
    tensor = "model.layers.0.self_attn.o_proj.weight"
    _set_last_value(checkpoint, tensor, np.float32(65520).tobytes())
    with pytest.raises(BundleError) as caught:
        write_bundle(checkpoint, tmp_path / "bundle", ["fp16"])
    assert str(caught.value) == (
        "a weight must be finite and fit float16 (layers.0.self_attn.o_proj)"
    )
    assert_nothing_in(tmp_path / "bundle")


def test_a_shard_with_the_name_of_a_file_of_ours_is_refused_and_stays(tmp_path: Path) -> None:
    checkpoint = tiny_nvembed(tmp_path / "source", shards=2)
    path, name = checkpoint.path, "latent_attention.safetensors"
    (path / "model-00002-of-00002.safetensors").rename(path / name)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", name))
    before = tree(path)
    with pytest.raises(BundleError, match=f"a shard may not be called {name}"):
        write_bundle(path, tmp_path / "bundle", ["fp16"], contract=checkpoint.contract, onnx=True)
    assert tree(path) == before
    assert_nothing_in(tmp_path / "bundle")


def test_a_truncated_shard_is_an_error_before_anything_is_written(
    own_checkpoint: Path, tmp_path: Path
) -> None:
    shard = sorted(own_checkpoint.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(BundleError) as caught:
        write_bundle(own_checkpoint, tmp_path / "bundle", VARIANTS)
    assert str(caught.value) == (
        f"{shard} must be {size} bytes long by its header, got {size - 100}: it is truncated"
    )
    assert_nothing_in(tmp_path / "bundle")


def _touch(shard: Path) -> None:
    os.utime(shard, ns=(0, 12345))


def _truncate(shard: Path) -> None:
    os.truncate(shard, 5000)


def _replace(shard: Path) -> None:
    shutil.copy2(shard, shard.with_suffix(".new"))
    shard.with_suffix(".new").replace(shard)


def _remove(shard: Path) -> None:
    shard.unlink()


@pytest.mark.parametrize("change", [_touch, _truncate, _replace, _remove])
@pytest.mark.parametrize(
    "moment", [("quantizing", 1), ("quantizing", 2), ("graphs, checks and hashes", 1)]
)
def test_a_source_that_changes_during_the_export_is_one_error_and_no_bundle(
    change: Callable[[Path], None], moment: tuple[str, int], own_checkpoint: Path, tmp_path: Path
) -> None:
    shard = sorted(own_checkpoint.glob("*.safetensors"))[1]
    (tmp_path / "neighbour").write_text("not ours")
    last = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        last = (what, done)
        if last == moment:
            change(shard)

    with pytest.raises(BundleError) as caught:
        write_bundle(
            own_checkpoint,
            tmp_path / "bundle",
            ["fp16", "int8", "int4"],
            copy=True,
            progress=progress,
        )
    assert str(caught.value) == (
        f"{shard} changed during the export: repeat it once the file stays as it is"
    )
    assert last == moment or moment[0] != "quantizing"  # known at the end of the group
    assert list((tmp_path / "bundle").iterdir()) == []
    assert (tmp_path / "neighbour").read_text() == "not ours"


def test_a_linked_file_that_changes_behind_its_time_is_found_by_its_hash(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    shard = sorted(own_checkpoint.glob("*.safetensors"))[0]
    status = shard.stat()

    def progress(what: str, done: int, total: int) -> None:
        if what == "graphs, checks and hashes":
            with shard.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"\0\0")
            os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(BundleError) as caught:
        write_bundle(own_checkpoint, tmp_path / "bundle", ["fp16"], progress=progress)
    assert str(caught.value).startswith(f"{shard} changed during the export: ")
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_source_is_hashed_once_as_long_as_it_stays_the_same(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    file_sha256 = identity.file_sha256
    monkeypatch.setattr(
        identity, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path)
    )
    for path in own_checkpoint.iterdir():
        os.utime(path, (1000, 1000))
    names = sorted(path.name for path in open_source(own_checkpoint).files())
    write_bundle(own_checkpoint, tmp_path / "first", ["int8"])
    assert sorted(hashed) == names
    write_bundle(own_checkpoint, tmp_path / "second", ["int8"])
    assert sorted(hashed) == names
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    os.utime(own_checkpoint / "config.json", (2000, 2000))
    write_bundle(own_checkpoint, tmp_path / "third", ["int8"])
    assert sorted(hashed) == sorted([*names, "config.json"])


def test_the_hash_of_a_file_that_was_just_written_is_not_remembered(
    own_checkpoint: Path, tmp_path: Path
) -> None:
    """A second write within the same tick of the disk's clock would not be seen."""
    config = own_checkpoint / "config.json"
    os.utime(config)
    write_bundle(own_checkpoint, tmp_path / "first", ["int8"])
    status = config.stat()
    text = config.read_text()
    config.write_text(text.replace("\n", " ", 1))
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns))
    write_bundle(own_checkpoint, tmp_path / "second", ["int8"])
    first, second = (Bundle(tmp_path / name).manifest.source for name in ("first", "second"))
    assert first["sha256"] != second["sha256"]


def test_a_source_that_vanishes_before_it_is_hashed_is_an_error(
    own_checkpoint: Path, tmp_path: Path
) -> None:
    source = open_source(own_checkpoint)
    shard = sorted(own_checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BundleError) as caught:
        export(source, tmp_path / "bundle", CONTRACT, variants=VARIANTS, onnx=False)
    assert str(caught.value) == f"{shard} cannot be read: No such file or directory"
    assert not (tmp_path / "bundle").exists()


def _set_last_value(checkpoint: Path, tensor: str, value: bytes) -> None:
    for shard in checkpoint.glob("*.safetensors"):
        stored = read_header(shard).get(tensor)
        if stored is not None:
            with shard.open("r+b") as file:
                file.seek(stored.offset + stored.nbytes - len(value))
                file.write(value)
            return
    raise AssertionError(tensor)
