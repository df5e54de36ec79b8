"""A hub id as a source, against a stand-in for the hub."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from export import linking
from export.pipeline import export
from export.sources import HuggingFaceDirectory, fetch_description, open_source
from lowmem import hub as hub_files
from lowmem.errors import BackendError, BundleError, CapacityError, InputError
from lowmem.hub import HubModel, parse_id
from tests.bundles import assert_equal, tree
from tests.hub_server import COMMIT, Hub, serving
from tests.models import CONTRACT, tiny_checkpoint

NAME = "someone/tiny-embedder"
CARD = "---\nlicense: mit\n---\n"
CHUNK_BYTES = 2**14
FIRST = {"README.md", "modules.json", "config.json"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model card, sentence-transformers' files, and much that no export needs."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2, layers=2).path
    (path / "README.md").write_text(CARD)
    (path / "modules.json").write_text("[]")
    for name in ("1_Pooling/config.json", "onnx/config.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps({"this is": name}))  # the cache keeps equal files once
    for name in (
        *("pytorch_model.bin", "consolidated.pth", "model.gguf", "onnx/model.onnx"),
        *("adapter_model.safetensors", "2_Dense/model.safetensors", "tokenizer.model"),
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"large")
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[Hub]:
    """The stand-in with the checkpoint, and an empty cache of this user, who has no token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    disable_progress_bars()
    with serving() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.endpoint)
        stand_in.models[NAME] = checkpoint
        yield stand_in
    enable_progress_bars()


@pytest.fixture
def own(hub: Hub, checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, served in its place, to be changed."""
    hub.models[NAME] = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    return hub.models[NAME]


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("Linq-AI-Research/Linq-Embed-Mistral", ("Linq-AI-Research/Linq-Embed-Mistral", "main")),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b_c.d-e", ("a/b_c.d-e", "main")),
        *((text, None) for text in ("a", "a/b/c", "./a/b", "/a/b", "a/", "a/b@", "~/a", "../a")),
        *((text, None) for text in ("a/b.gguf", "a/b c", "a/..", "")),
    ],
)
def test_what_can_be_a_hub_id(text: str, model: tuple[str, str] | None) -> None:
    assert parse_id(text) == (model and HubModel(*model))


def test_only_the_files_that_an_export_needs_are_downloaded(hub: Hub) -> None:
    source = open_source(NAME)
    assert isinstance(source, HuggingFaceDirectory)
    assert (source.name, source.revision, source.licence) == (NAME, COMMIT, "mit")
    assert hub.got() == {
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_single_file_of_weights_is_taken_and_the_index_beside_it_left(
    hub: Hub, tmp_path: Path
) -> None:
    hub.models[NAME] = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    (hub.models[NAME] / "model.safetensors.index.json").write_text("{}")
    assert open_source(NAME).licence is None
    assert {name for name in hub.got() if "safetensors" in name} == {"model.safetensors"}


def test_every_file_after_the_listing_is_asked_for_at_one_commit(hub: Hub) -> None:
    open_source(f"{NAME}@v1")
    listing, *files = hub.paths
    assert listing == f"/api/models/{NAME}/revision/v1"
    assert files
    assert all(path.startswith(f"/{NAME}/resolve/{COMMIT}/") for path in files)


def test_a_second_export_downloads_nothing(hub: Hub) -> None:
    open_source(NAME)
    hub.files.clear()
    open_source(NAME)
    assert hub.files == []


def test_the_hub_and_its_directory_give_the_same_bundle_but_for_name_and_revision(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    for source, place in ((NAME, "hub-bundle"), (checkpoint, "bundle")):
        opened = open_source(source)
        export(opened, tmp_path / place, CONTRACT, variants=["fp16", "int8", "int4"])
    trees = [tree(tmp_path / place) for place in ("hub-bundle", "bundle")]
    manifests = [json.loads(files.pop("lowmem.json")) for files in trees]
    assert_equal(*trees)
    sources = [manifest.pop("source") for manifest in manifests]
    assert manifests[0] == manifests[1]
    digest = sources[1]["sha256"]
    assert sources[0] == {"name": NAME, "sha256": digest, "revision": COMMIT, "model": None}
    assert sources[1] == {"name": "tiny", "sha256": digest, "revision": None, "model": None}
    # The cache holds links; what is linked from the bundle is the file behind them.
    for shard in (tmp_path / "hub-bundle" / "fp16").glob("*.safetensors"):
        cached = next((tmp_path / "hub").rglob(f"snapshots/*/{shard.name}"))
        assert cached.is_symlink()
        assert not shard.is_symlink()
        assert shard.samefile(cached)


def test_a_broken_download_goes_on_where_it_broke(
    hub: Hub, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = "model-00001-of-00002.safetensors"
    hub.break_at[shard] = [3 * CHUNK_BYTES]
    with caplog.at_level(logging.WARNING):
        source = open_source(NAME)
    first, again = (entry for entry in hub.files if entry.startswith(f"GET {shard}"))
    assert first == f"GET {shard}"
    start = int(again.split()[2].rstrip("-"))
    assert 0 < start <= 3 * CHUNK_BYTES
    assert source.shards is not None
    assert source.shards[0].read_bytes() == (checkpoint / shard).read_bytes()
    assert caplog.records


def test_a_download_that_breaks_again_and_again_is_an_error_and_goes_on_in_the_next_run(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shard = "model-00001-of-00002.safetensors"
    hub.break_at[shard] = [0] * 100
    with pytest.raises(BackendError, match=f"{shard} of {NAME}@{COMMIT} could not be downloaded"):
        open_source(NAME)
    del hub.break_at[shard]
    hub.files.clear()
    source = open_source(NAME)
    assert hub.got() == {shard, "model-00002-of-00002.safetensors"}
    assert source.shards is not None
    assert source.shards[0].read_bytes() == (checkpoint / shard).read_bytes()


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("license: other\nlicense_name: Own-Licence", "Own-Licence"),
        ("license: other", "other"),
    ],
)
def test_a_licence_that_may_forbid_a_use_is_asked_about_before_weights_come(
    hub: Hub, own: Path, card: str, named: str
) -> None:
    (own / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(InputError) as caught:
        open_source(NAME)
    assert str(caught.value) == (
        f"the licence of {NAME}, '{named}', may not permit every use: read it, and accept it "
        f"with --accept-licence '{named}'"
    )
    assert hub.got() == FIRST
    assert open_source(NAME, accepts_licence=lambda name: name == named).licence == named


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, InputError, "quantized already"),
        ({"model_type": "qwen2"}, BundleError, "model_type must be one of"),
    ],
)
def test_a_model_that_is_not_exported_is_refused_before_its_weights_come(
    hub: Hub, own: Path, config: dict[str, object], error: type[Exception], message: str
) -> None:
    value = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(value | config))
    with pytest.raises(error, match=message):
        open_source(NAME)
    assert hub.got() == FIRST


def test_a_module_that_is_not_computed_is_refused_before_the_weights_come(
    hub: Hub, own: Path
) -> None:
    (own / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(BundleError, match=r"got the module 'sentence_transformers\.models\.Dense'"):
        open_source(NAME)
    assert hub.got() == FIRST


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", f"a source must have a config.json, and {NAME} on the hub has none"),
        ("model.safetensors.index.json", f"weights must be in safetensors, and {NAME} on the hub"),
        ("tokenizer.json", f"a source must have a tokenizer.json, and {NAME} on the hub has none"),
    ],
)
def test_a_model_that_lacks_a_file_is_refused_by_its_listing_alone(
    hub: Hub, own: Path, missing: str, message: str
) -> None:
    (own / missing).unlink()
    with pytest.raises(InputError, match=message):
        open_source(NAME)
    assert hub.files == []


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "model-00009-of-00009.safetensors"}, {"a": "2_Dense/model.safetensors"}, {"a": "../x"}],
)
def test_an_index_may_name_only_shards_beside_it(
    hub: Hub, own: Path, weight_map: dict[str, str]
) -> None:
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BundleError, match=f"beside its index, got '{weight_map['a']}'"):
        open_source(NAME)
    assert not any(name.endswith(".safetensors") for name in hub.got())


def test_an_index_without_a_weight_map_is_refused(hub: Hub, own: Path) -> None:
    (own / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BundleError, match="weight_map must be an object that is not empty"):
        open_source(NAME)


def test_an_unknown_model_is_refused_with_both_places_that_were_looked_at(hub: Hub) -> None:
    with pytest.raises(InputError) as caught:
        open_source("someone/else")
    assert str(caught.value) == (
        f"there is neither a directory someone/else nor a model {hub.endpoint}/someone/else for "
        "this user: check the name; for a private model, log in with `hf auth login` or set "
        "HF_TOKEN"
    )


def test_an_id_that_the_hub_does_not_allow_is_refused(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"must be ORG/NAME or ORG/NAME@REVISION, got 'a/b--c'"):
        open_source("a/b--c")
    assert hub.paths == []


def test_an_unknown_revision_is_refused(hub: Hub) -> None:
    with pytest.raises(InputError, match=f"{NAME} has no revision 'v9': {hub.endpoint}/{NAME}/com"):
        open_source(f"{NAME}@v9")


def test_a_private_model_comes_with_the_users_token_alone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(InputError, match="for a private model, log in with `hf auth login`"):
        open_source(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert open_source(NAME).revision == COMMIT


def test_a_gated_model_is_refused_with_the_way_in(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(InputError) as caught:
        open_source(NAME)
    assert str(caught.value) == (
        f"{NAME} is given only to users who have agreed to its terms: agree at "
        f"{hub.endpoint}/{NAME}, then log in with `hf auth login` or set HF_TOKEN"
    )


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (403, InputError, r"refuses someone/tiny-embedder \(HTTP status 403\): log in with"),
        (418, BackendError, "answers with HTTP status 418 for someone/tiny-embedder: try again"),
    ],
)
def test_other_answers_of_the_hub_are_errors(
    hub: Hub, status: int, error: type[Exception], message: str
) -> None:
    hub.status = status
    with pytest.raises(error, match=message):
        open_source(NAME)
    with pytest.raises(error, match=message):
        hub_files.fetch(HubModel(NAME), "config.json")


def test_without_a_network_a_directory_is_asked_for(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port that nobody listens at
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the package's attempts
    message = r"127\.0\.0\.1:9 cannot be reached \(\[Errno 111\] .+\): without it, give the dir"
    with pytest.raises(BackendError, match=message):
        open_source(NAME)
    with pytest.raises(BackendError, match=message):
        hub_files.fetch(HubModel(NAME), "config.json")


def test_a_file_that_is_not_there_is_named(hub: Hub) -> None:
    with pytest.raises(InputError, match=f"{NAME}@v1 has no vocab.json"):
        hub_files.fetch(HubModel(NAME, "v1"), "vocab.json")


def test_a_disk_without_room_is_found_before_the_weights_come(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    left = {*NEEDED} - {"modules.json"}  # which comes first, to be refused before the weights
    needed = sum((checkpoint / name).stat().st_size for name in left)
    with pytest.raises(CapacityError, match=f"needs {needed} bytes of disk, 10000 are free"):
        open_source(NAME)
    assert not any(name.endswith(".safetensors") for name in hub.got())


NEEDED = (
    "1_Pooling/config.json",
    "modules.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_a_full_disk_is_an_error_with_the_way_out(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(CapacityError, match=r"the disk is full: README\.md .* set HF_HOME to"):
        open_source(NAME)


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(
    hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "hub").write_text("a file where the cache should be")
    with pytest.raises(InputError, match=r"hub cannot be written \(.+\): set HF_HOME to another"):
        open_source(NAME)


def test_what_the_hubs_own_transport_raises_is_an_error_with_its_words(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(BackendError, match=r"could not be downloaded \(Data processing error: C"):
        open_source(NAME)


def test_of_a_model_that_may_be_known_only_what_tells_is_downloaded(hub: Hub) -> None:
    directory = fetch_description(HubModel(NAME))
    assert hub.got() == {"1_Pooling/config.json", "config.json"}
    assert (directory / "1_Pooling" / "config.json").is_file()


def test_what_is_no_source_is_refused_before_it_is_described(hub: Hub, own: Path) -> None:
    (own / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"must have a tokenizer\.json, and .* has none"):
        fetch_description(HubModel(NAME))
    assert not hub.got()


def test_weights_that_another_commit_had_too_need_no_room(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source(NAME)
    hub.commit = COMMIT[::-1]
    hub.files.clear()
    left = [name for name in NEEDED if not name.endswith((".safetensors", "modules.json"))]
    free = sum((checkpoint / name).stat().st_size for name in left)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        assert open_source(NAME).revision == hub.commit
    assert not any(name.endswith(".safetensors") for name in hub.got())
