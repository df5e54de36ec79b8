"""A variant's directory: what lies in it beside the weights, and its entry in the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from export.graph import write_graphs
from export.graph.latent_attention import FOLDED
from export.identity import SourceIdentity, changed
from export.job import Job
from export.journal import Finished
from export.linking import link_or_copy
from export.sources import Source
from export.workspace import Workspace
from lowmem.artifact import strict_json
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format, quantization_config, weight_bytes
from lowmem.artifact.manifest import FileEntry, Variant, file_sha256
from lowmem.artifact.stock_files import check as check_stock_files
from lowmem.artifact.tensors import INDEX_FILE, SINGLE_FILE
from lowmem.artifact.variants import DTYPE_NAMES
from lowmem.artifact.weights import Checkpoint, latent_shapes, module_shapes
from lowmem.errors import BundleError


def write_small_files(
    directory: Path,
    formats: Mapping[str, Format],
    config: ModelConfig,
    dtype: str,
    stock: Mapping[str, bytes],
) -> None:
    """Writes a variant's config and what stock tools read beside it.

    Args:
        directory: The variant's; made if it is not there.
        formats: Module to format.
        config: The model's shape.
        dtype: F16 or BF16, of what is not quantized.
        stock: Path within the variant to content.
    """
    directory.mkdir(exist_ok=True)
    value = config_json(config, DTYPE_NAMES[dtype])
    quantization = quantization_config(formats)
    if quantization is not None:
        value["quantization_config"] = quantization
    (directory / "config.json").write_text(strict_json.dumps(value))
    for name, content in stock.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def link_shards(
    source: Source, job: Job, workspace: Workspace, finished: Finished, copy: bool
) -> None:
    """Links the source's own files, or copies them, unless a killed export has done so.

    Raises:
        BundleError: One has the name of a file that export writes itself.
        CapacityError: The disk is full.
    """
    assert source.shards is not None
    for shard in source.shards:
        if shard.name == FOLDED:
            raise BundleError(f"a shard may not be called {FOLDED}, which is export's own: {shard}")
        file = f"{job.name}/{shard.name}"
        if file not in finished:
            link_or_copy(shard, workspace.partial / file, copy=copy)
            workspace.record(file, {file: {}})
    if [shard.name for shard in source.shards] != [SINGLE_FILE]:
        index = source.shards[0].parent / INDEX_FILE
        (workspace.partial / job.name / INDEX_FILE).write_bytes(index.read_bytes())


def check_linked(source: Source, identity: SourceIdentity, variant: Variant) -> None:
    """Compares linked files with what the source was when the export began.

    Raises:
        BundleError: They differ.
    """
    for shard in source.shards or ():
        if variant.files[shard.name].sha256 != identity.files[shard.name]:
            raise changed(shard)


def finish(
    directory: Path,
    job: Job,
    contract: Contract,
    errors: Mapping[str, float],
    *,
    onnx: bool,
    weights_sha256: str | None = None,
) -> Variant:
    """Re-opens what was written, adds the graphs, and hashes what was not hashed meanwhile.

    Args:
        directory: The variant's, complete but for the graphs.
        job: What was to be written.
        contract: The input contract.
        errors: Module to its error on the calibration texts, as calibration found it; none where
            the variant was not calibrated.
        onnx: Whether to write graphs.
        weights_sha256: Of the file with the weights, where it is known.

    Raises:
        BundleError: It does not read back as it should.
    """
    checkpoint = Checkpoint(directory)
    if dict(checkpoint.formats) != dict(job.formats):
        raise BundleError(f"{job.name} does not read back in the formats it was written in")
    check_stock_files(directory, checkpoint.config, contract)
    graphs = write_graphs(directory, contract) if onnx else {}
    known = {} if weights_sha256 is None else {SINGLE_FILE: weights_sha256}
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = FileEntry(path.stat().st_size, known.get(name) or file_sha256(path))
    modules = _modules(checkpoint, errors)
    return Variant(job.name, job.recipe, _bits(checkpoint), modules, graphs, files)


def _modules(
    checkpoint: Checkpoint, errors: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Bits and error of the attention and the MLP of each layer."""
    weights: dict[str, int] = {}
    stored: dict[str, int] = {}
    for module, shape in module_shapes(checkpoint.config).items():
        part = module.rpartition(".")[0]
        weights[part] = weights.get(part, 0) + math.prod(shape)
        size = weight_bytes(checkpoint.formats[module], *shape)
        stored[part] = stored.get(part, 0) + size
    return {
        part: {
            "bits": round(8 * stored[part] / weights[part], 4),
            "error": float(f"{errors[part]:.4g}") if part in errors else None,
        }
        for part in weights
    }


def _bits(checkpoint: Checkpoint) -> dict[str, float]:
    config = checkpoint.config
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    linears = sum(
        weight_bytes(checkpoint.formats[module], *shape)
        for module, shape in module_shapes(config).items()
    )
    others = config.hidden_size * (config.vocab_size + 2 * config.num_hidden_layers + 1)
    others += sum(map(math.prod, latent_shapes(config).values()))
    return {
        "linears": round(8 * linears / config.linear_weights, 4),
        "model": round(8 * stored / (config.linear_weights + others), 4),
    }
