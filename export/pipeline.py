"""The export: lay out, quantize group by group, write, check, publish.

Memory holds one tensor of the source at a time, whatever the model's size. All variants are
written in one pass over the source.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export import licences
from export.graph import write_graphs
from export.layout import Layout, lay_out
from export.quantizers.data_free import quantize
from export.sources import Source
from export.workspace import Workspace, link_or_copy, links
from export.writer import TensorWriter
from lowmem.artifact import strict_json
from lowmem.artifact.config import config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format, Plain, quantization_config
from lowmem.artifact.manifest import Bundle, FileEntry, Manifest, Variant, file_sha256
from lowmem.artifact.stock_files import check as check_stock_files
from lowmem.artifact.stock_files import render as render_stock_files
from lowmem.artifact.tensors import INDEX_FILE, SINGLE_FILE, RawTensor
from lowmem.artifact.variants import DTYPE_NAMES, formats_for, recipe_for
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, Checkpoint
from lowmem.compute.operations.linear import to_torch
from lowmem.errors import BundleError, CapacityError, InputError

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""

_SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Job:
    """One variant to be written."""

    name: str
    formats: Mapping[str, Format]
    layout: Layout | None  # None where the source's own files are linked


def export(
    source: Source,
    bundle: Path,
    contract: Contract,
    *,
    variants: Sequence[str],
    onnx: bool = True,
    copy: bool = False,
    force: bool = False,
    accepts_licence: licences.Accepts = licences.accepts_none,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Writes variants of a model into a bundle, or adds them to one.

    Args:
        source: The checkpoint.
        bundle: The bundle's directory; made if it is not there.
        contract: The input contract; its length limit is cut to the model's own.
        variants: Names of the variants.
        onnx: Whether to write ONNX graphs.
        copy: Whether to write the bytes of ``fp16`` again instead of linking the source's files.
        force: Whether to replace variants that were made otherwise.
        accepts_licence: Asked about each licence that may not permit every use.
        progress: Told what has been done.

    Returns:
        The new manifest.

    Raises:
        BundleError: The source is damaged, or the bundle was made from another one.
        CapacityError: The disk has not enough room.
        InputError: The licence is not accepted, a variant is unknown or is there from another
            recipe, or BUNDLE is no bundle.
    """
    licences.check(source.licence, accepts_licence, source.name)
    config = source.config
    contract = contract.bounded(config.longest_sequence)
    dtype = "BF16" if source.dtype == "BF16" else "F16"
    workspace = Workspace(bundle)
    old = workspace.manifest()
    stanza = _source_stanza(source, progress)
    if old is not None and old.source["sha256"] != stanza["sha256"]:
        raise BundleError(f"{bundle} was exported with another source: choose another directory")
    if old is not None and old.contract != contract:
        raise BundleError(f"{bundle} was exported with another contract: choose another directory")
    if not variants:
        raise InputError("variants must name at least one variant")
    jobs = []
    for name in dict.fromkeys(variants):
        formats = formats_for(name, config, dtype)
        if old is not None and name in old.variants and not force:
            _check_existing(bundle, old, name, dtype, onnx)
            continue
        linked = name == "fp16" and source.shards is not None
        jobs.append(_Job(name, formats, None if linked else lay_out(config, dtype, formats)))
    if not jobs and old is not None:
        return old

    stock = render_stock_files(config, contract, source.tokenizer_files())
    workspace.begin([job.name for job in jobs], _needed_bytes(jobs, source, bundle, copy))
    try:
        for job in jobs:
            directory = workspace.partial / job.name
            _write_small_files(directory, job.formats, source, dtype, stock)
            if job.layout is None:
                _link_shards(source, directory, copy)
        _write_tensors(source, dtype, jobs, workspace.partial, progress)
        written = {}
        for done, job in enumerate(jobs):
            progress("graphs, checks and hashes", done, len(jobs))
            directory = workspace.partial / job.name
            written[job.name] = _finish(directory, job, contract, dtype, onnx)
        manifest = Manifest(
            old.source if old else stanza,
            source.licence,
            contract,
            {**(old.variants if old else {}), **written},
        )
        workspace.publish([job.name for job in jobs], manifest)
    except BaseException as error:
        workspace.abandon()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk is full: {bundle}") from error
        raise
    return manifest


def _source_stanza(source: Source, progress: Progress) -> dict[str, Any]:
    """Name and identity of a source: one hash over the sorted hashes of its files."""
    files = source.files()
    entries = []
    for done, path in enumerate(files):
        progress("hashing the source", done, len(files))
        entries.append((path.name, file_sha256(path)))
    digest = hashlib.sha256(strict_json.canonical(sorted(entries))).hexdigest()
    return {"name": source.name, "sha256": digest, "revision": source.revision}


def _check_existing(bundle: Path, old: Manifest, name: str, dtype: str, onnx: bool) -> None:
    there = old.variants[name]
    made_alike = there.recipe == recipe_for(name, dtype)
    if not made_alike or (onnx and not there.graphs and name in ("fp16", "int8", "int4")):
        raise InputError(
            f"{bundle} already has a variant {name} that was made otherwise: --force replaces it"
        )
    Bundle(bundle).check(name)


def _needed_bytes(jobs: Sequence[_Job], source: Source, bundle: Path, copy: bool) -> int:
    needed = 0
    place = next(folder for folder in (bundle, *bundle.absolute().parents) if folder.is_dir())
    for job in jobs:
        needed += _SMALL_FILES_BYTES
        if job.layout is not None:
            needed += job.layout.size
        else:
            for shard in source.shards or ():
                if copy or not links(shard, place):
                    needed += shard.stat().st_size
    return needed


def _write_small_files(
    directory: Path,
    formats: Mapping[str, Format],
    source: Source,
    dtype: str,
    stock: Mapping[str, bytes],
) -> None:
    directory.mkdir()
    config = config_json(source.config, DTYPE_NAMES[dtype])
    quantization = quantization_config(formats)
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(strict_json.dumps(config))
    for name, content in stock.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _link_shards(source: Source, directory: Path, copy: bool) -> None:
    assert source.shards is not None
    for shard in source.shards:
        link_or_copy(shard, directory / shard.name, copy=copy)
    if [shard.name for shard in source.shards] != [SINGLE_FILE]:
        index = source.shards[0].parent / INDEX_FILE
        (directory / INDEX_FILE).write_bytes(index.read_bytes())


def _write_tensors(
    source: Source, dtype: str, jobs: Sequence[_Job], partial: Path, progress: Progress
) -> None:
    """Reads each tensor of the source once, and writes it in every variant's format."""
    config = source.config
    with ExitStack() as stack:
        writers = {
            job.name: stack.enter_context(
                TensorWriter(partial / job.name / SINGLE_FILE, job.layout)
            )
            for job in jobs
            if job.layout is not None
        }
        plain = [EMBEDDING]
        for index in range(config.num_hidden_layers):
            progress("quantizing", index, config.num_hidden_layers)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                plain.append(f"layers.{index}.{norm}.weight")
            for name in plain:
                raw = _sixteen_bits(source.tensor(name), dtype, name)
                for writer in writers.values():
                    writer.write(name, raw)
            plain = []
            for linear in config.linears():
                module = f"layers.{index}.{linear}"
                raw = _sixteen_bits(source.tensor(f"{module}.weight"), dtype, module)
                for job in jobs:
                    if job.name in writers:
                        _write_linear(writers[job.name], module, raw, job.formats[module])
        raw = _sixteen_bits(source.tensor(FINAL_NORM), dtype, FINAL_NORM)
        for writer in writers.values():
            writer.write(FINAL_NORM, raw)
            writer.finish()


def _write_linear(writer: TensorWriter, module: str, raw: RawTensor, form: Format) -> None:
    if isinstance(form, Plain):
        writer.write(f"{module}.weight", raw)
        return
    for suffix, tensor in quantize(to_torch(raw, "cpu"), form, module).items():
        writer.write(f"{module}.{suffix}", tensor)


def _sixteen_bits(raw: RawTensor, dtype: str, name: str) -> RawTensor:
    """The tensor in the variant's 16-bit dtype; float32 is rounded once, to float16."""
    weight = to_torch(raw, "cpu")
    if raw.dtype != dtype:
        weight = weight.half()
    if not bool(torch.isfinite(weight).all()):
        raise BundleError(f"a weight must be finite and fit {DTYPE_NAMES[dtype]} ({name})")
    return raw if raw.dtype == dtype else RawTensor("F16", weight.numpy())


def _finish(directory: Path, job: _Job, contract: Contract, dtype: str, onnx: bool) -> Variant:
    """Re-opens what was written, adds the graphs, and hashes all of it."""
    checkpoint = Checkpoint(directory)
    if dict(checkpoint.formats) != dict(job.formats):
        raise BundleError(f"{job.name} does not read back in the formats it was written in")
    check_stock_files(directory, checkpoint.config, contract)
    graphs = write_graphs(directory, contract) if onnx else {}
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = FileEntry(path.stat().st_size, file_sha256(path))
    return Variant(job.name, recipe_for(job.name, dtype), _bits(checkpoint), graphs, files)


def _bits(checkpoint: Checkpoint) -> dict[str, float]:
    config = checkpoint.config
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    linears = checkpoint.linear_bytes()
    others = config.hidden_size * (config.vocab_size + 2 * config.num_hidden_layers + 1)
    return {
        "linears": round(8 * linears / config.linear_weights, 4),
        "model": round(8 * stored / (config.linear_weights + others), 4),
    }
