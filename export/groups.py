"""The weights of all variants, written in one pass over the source, a group at a time.

A group is the embedding, a layer, or what stands behind the last layer. One that is on the disk in
every variant is journaled, and an export that goes on after a killed one does not read it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from export.identity import SourceIdentity
from export.job import Job, by_file
from export.journal import Finished
from export.quantizers.data_free import is_finite, quantize
from export.sources import Source
from export.workspace import Workspace
from export.writer import TensorWriter
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.formats import Format, Plain
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.variants import DTYPE_NAMES
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, latent_shapes
from lowmem.compute.operations.linear import to_torch
from lowmem.errors import BundleError


def write_groups(
    source: Source,
    identity: SourceIdentity,
    dtype: str,
    jobs: Sequence[Job],
    workspace: Workspace,
    finished: Finished,
    progress: Callable[[str, int, int], None],
) -> None:
    """Reads each tensor of the source once, and writes it in every variant's format.

    Args:
        source: The checkpoint.
        identity: The source's files, which must stay as they are.
        dtype: F16 or BF16, of what is not quantized.
        jobs: The variants; those without a layout are not written here.
        workspace: Where the files are, and the journal.
        finished: Groups that a killed export has left whole, which are not read again.
        progress: Told of each group before it is read.

    Raises:
        BundleError: A weight is not finite or does not fit its format, or the source changes.
        CapacityError: The disk is full.
    """
    kept, groups = by_file(finished), _groups(source.config)
    with ExitStack() as stack:
        writers = {}
        for job in jobs:
            if job.layout is not None:
                path = workspace.partial / job.file
                writer = TensorWriter(path, job.layout, kept.get(job.file, ()))
                writers[job.file] = stack.enter_context(writer)
        for done, group in enumerate(groups):
            if group[0] in finished:
                continue
            progress("quantizing", done, len(groups))
            for name in group:
                module = name.removesuffix(".weight")
                is_linear = module in jobs[0].formats
                raw = _sixteen_bits(source.tensor(name), dtype, module if is_linear else name)
                for job in jobs:
                    if job.file not in writers:
                        continue
                    if is_linear:
                        _write_linear(writers[job.file], module, raw, job.formats[module])
                    else:
                        writers[job.file].write(name, raw)
            identity.check()
            workspace.record(group[0], {file: writer.sync() for file, writer in writers.items()})
        for writer in writers.values():
            writer.finish()


def _groups(config: ModelConfig) -> list[list[str]]:
    """The source's tensors in the layout's order: embedding, layers, final norm and pooling."""
    layers = [
        [f"layers.{index}.{name}.weight" for name in (*NORMS, *config.linears())]
        for index in range(config.num_hidden_layers)
    ]
    return [[EMBEDDING], *layers, [FINAL_NORM, *latent_shapes(config)]]


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
    if not is_finite(weight):
        raise BundleError(f"a weight must be finite and fit {DTYPE_NAMES[dtype]} ({name})")
    return raw if raw.dtype == dtype else RawTensor("F16", weight.numpy())
