"""Bundles that workspaces wrote, for tests of what a workspace leaves."""

from collections.abc import Mapping
from pathlib import Path

from export.workspace import Workspace
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import FileEntry, Manifest, Variant, file_sha256
from tests.bundles import tree

CONTRACT = Contract(
    query_template="{text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=64,
    normalize_embeddings=True,
)
SOURCE = {"name": "tiny", "sha256": "0" * 64}
PARTIAL = ".partial"
WORK = "digest of the work"
OLD, NEW = b"the old weights", b"the new weights, and more"


def fill(directory: Path, content: bytes) -> None:
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "1_Pooling" / "config.json").write_text("{}")


def variant_of(directory: Path) -> Variant:
    files = {
        file.relative_to(directory).as_posix(): FileEntry(file.stat().st_size, file_sha256(file))
        for file in directory.rglob("*")
        if file.is_file()
    }
    return Variant(directory.name, {}, {"linears": 16, "model": 16}, {}, {}, files)


def put(path: Path, contents: Mapping[str, bytes]) -> Manifest:
    """Writes variants as an export does."""
    with Workspace(path) as workspace:
        old = workspace.manifest()
        workspace.begin(contents, 0, WORK)
        for name, content in contents.items():
            fill(workspace.partial / name, content)
        written = {name: variant_of(workspace.partial / name) for name in contents}
        variants = {**(old.variants if old else {}), **written}
        manifest = Manifest(SOURCE, None, CONTRACT, variants)
        workspace.publish(list(contents), manifest)
    return manifest


def add_strangers(path: Path) -> dict[str, bytes]:
    for name in ("reference/probe.npy", "reports/fp16.json", "notes.txt", "mine/int4/a", ".hidden"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"what is in {name}")
    return tree(path)
