"""The weights of all variants, written in one pass over the source, a group at a time.

A group is the embedding, a layer, or what stands behind the last layer. One that is on the disk in
every variant is journaled, and an export that goes on after a killed one does not read it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Any

from export.calibration import Calibration, rounded_linears
from export.identity import SourceIdentity
from export.job import Job, by_file
from export.journal import Checksums, Finished
from export.quantizers.data_free import is_finite, quantize
from export.sources import Source
from export.workspace import Workspace
from export.writer import TensorWriter
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.formats import Plain
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.variants import DTYPE_NAMES
from lowmem.artifact.weights import (
    EMBEDDING,
    FINAL_NORM,
    LayerWeights,
    latent_shapes,
    layer_weights,
    module_shapes,
)
from lowmem.compute.operations.linear import to_torch
from lowmem.compute.threads import lone_threads
from lowmem.errors import BundleError
from lowmem.progress import Progress


def write_groups(
    source: Source,
    identity: SourceIdentity,
    dtype: str,
    jobs: Sequence[Job],
    workspace: Workspace,
    finished: Finished,
    progress: Progress,
    calibration: Calibration | None = None,
) -> dict[str, str]:
    """Reads each tensor of the source once, and writes it in every variant's format.

    Args:
        source: The checkpoint.
        identity: The source's files, which must stay as they are.
        dtype: F16 or BF16, of what is not quantized.
        jobs: The variants; those without a layout are not written here.
        workspace: Where the files are, and the journal.
        finished: Groups that a killed export has left whole, which are not read again.
        progress: Told of each group before it is read.
        calibration: What quantizes the jobs that are calibrated; it reads finished layers, too.

    Returns:
        The sha256 of each file that was written.

    Raises:
        BundleError: A weight is not finite or does not fit its format, or the source changes.
        CapacityError: The disk is full.
    """
    config = source.config
    kept, groups = by_file(finished), _groups(config)
    calibrated = range(1, len(groups) - 1) if calibration is not None else range(0)
    left = [i for i, group in enumerate(groups) if i in calibrated or group[0] not in finished]
    alone = [name for i in left if i not in calibrated for name in groups[i]]
    with ExitStack() as stack:
        writers = {}
        for job in jobs:
            if job.layout is not None:
                path = workspace.partial / job.file
                writer = TensorWriter(path, job.layout, kept.get(job.file, ()))
                writers[job.file] = stack.enter_context(writer)
        tensors = stack.enter_context(closing(_read_ahead(source, alone, dtype)))
        writing, recording = (stack.enter_context(_Behind()) for _ in range(2))
        for i in left:
            group, is_finished = groups[i], groups[i][0] in finished
            progress(_step(i in calibrated, is_finished), i, len(groups))
            if calibration is not None and i in calibrated:
                layer = read_layer(source, i - 1, dtype)
                _write_layer(
                    layer, jobs, writers, calibration, config, writing, is_finished=is_finished
                )
            else:
                for name in group:
                    _write_in_all(name, next(tensors), jobs, writers, writing)
            writing.wait()
            identity.check()
            if not is_finished:
                written = {file: writer.written() for file, writer in writers.items()}
                recording.do(_record, group[0], written, writers, workspace)
        recording.wait()
        return {file: writer.finish() for file, writer in writers.items()}


def _record(
    step: str,
    written: Mapping[str, Checksums],
    writers: Mapping[str, TensorWriter],
    workspace: Workspace,
) -> None:
    """Brings a group to the disk, notes and hashes it, while the next one is worked on."""
    for writer in writers.values():
        writer.sync()
    workspace.record(step, written)
    for writer in writers.values():
        writer.hash_written()


def _groups(config: ModelConfig) -> list[list[str]]:
    """The source's tensors in the layout's order: embedding, layers, final norm and pooling."""
    layers = [
        [f"layers.{index}.{name}.weight" for name in (*NORMS, *config.linears())]
        for index in range(config.num_hidden_layers)
    ]
    return [[EMBEDDING], *layers, [FINAL_NORM, *latent_shapes(config)]]


def _step(is_calibrated: bool, is_finished: bool) -> str:
    if not is_calibrated:
        return "quantizing"
    return "going through finished layers" if is_finished else "calibrating"


def _write_layer(
    layer: LayerWeights,
    jobs: Sequence[Job],
    writers: Mapping[str, TensorWriter],
    calibration: Calibration,
    config: ModelConfig,
    writing: _Behind,
    *,
    is_finished: bool,
) -> None:
    """Writes a layer in all variants, the calibrated ones by what they do to the texts."""
    written = [job for job in jobs if job.file in writers]
    formats = {
        job.name: {name: job.formats[f"layers.{layer.index}.{name}"] for name in layer.linears}
        for job in written
        if job.is_calibrated
    }
    with_folds = not is_finished and any(map(rounded_linears, formats.values()))
    full = calibration.full_precision(layer, with_folds=with_folds)
    for job in written:
        writer = writers[job.file]
        if job.is_calibrated and is_finished:
            stored = layer_weights(layer.index, config, job.formats, writer.read)
            calibration.replay(job.name, stored)
        elif job.is_calibrated:
            for name, raw in calibration.quantize(job.name, full, formats[job.name]).items():
                writer.write(f"layers.{layer.index}.{name}", raw)
        elif not is_finished:
            for norm, raw in layer.norms.items():
                _write_tensor(f"layers.{layer.index}.{norm}.weight", raw, job, writer, writing)
            for name, linear in layer.linears.items():
                weight = linear.tensors["weight"]
                _write_tensor(f"layers.{layer.index}.{name}.weight", weight, job, writer, writing)


def _write_in_all(
    name: str,
    raw: RawTensor,
    jobs: Sequence[Job],
    writers: Mapping[str, TensorWriter],
    writing: _Behind,
) -> None:
    """Writes a tensor of the source in every variant that has a file of its own."""
    for job in jobs:
        if job.file in writers:
            _write_tensor(name, raw, job, writers[job.file], writing)


def _write_tensor(
    name: str, raw: RawTensor, job: Job, writer: TensorWriter, writing: _Behind
) -> None:
    """Writes a tensor of the source in a variant's format, by itself alone."""
    module = name.removesuffix(".weight")
    form = job.formats.get(module)
    if form is None or isinstance(form, Plain):
        writing.do(_write, writer, {name: raw})
        return
    tensors = quantize(to_torch(raw, "cpu"), form, module)
    named = {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
    writing.do(_write, writer, named)


def _write(writer: TensorWriter, tensors: Mapping[str, RawTensor]) -> None:
    for name, raw in tensors.items():
        writer.write(name, raw)


class _Behind:
    """Does one thing in a thread beside the caller; what fails is raised at a later call."""

    def __init__(self) -> None:
        self._pool = lone_threads(1)
        self._doing: Future[None] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Begins some work, once that before it is done; raises what that raised."""
        self.wait()
        self._doing = self._pool.submit(work, *arguments)

    def wait(self) -> None:
        """Waits until all is done; raises what it raised."""
        doing, self._doing = self._doing, None
        if doing is not None:
            doing.result()


def _read_ahead(
    source: Source, names: Sequence[str], dtype: str
) -> Generator[RawTensor, None, None]:
    """The tensors of these names, each read while the one before it is worked on.

    Nothing here keeps one that has been given.
    """
    with lone_threads(1) as reader:
        reading: deque[Future[RawTensor]] = deque()
        for name in names:
            reading.append(reader.submit(read_tensor, source, name, dtype))
            if len(reading) > 1:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def read_layer(source: Source, index: int, dtype: str) -> LayerWeights:
    """A layer of the source in the variant's 16-bit dtype."""
    plain = dict.fromkeys(module_shapes(source.config), Plain(dtype))
    return layer_weights(index, source.config, plain, lambda name: read_tensor(source, name, dtype))


def read_tensor(source: Source, name: str, dtype: str) -> RawTensor:
    """A tensor in the variant's 16-bit dtype; float32 is rounded once, to float16."""
    raw = source.tensor(name)
    weight = to_torch(raw, "cpu")
    if raw.dtype != dtype:
        weight = weight.half()
    if not is_finite(weight):
        module = name.removesuffix(".weight")
        place = module if module in module_shapes(source.config) else name
        raise BundleError(f"a weight must be finite and fit {DTYPE_NAMES[dtype]} ({place})")
    return raw if raw.dtype == dtype else RawTensor("F16", weight.numpy())
