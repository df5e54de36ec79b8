"""Plans on ONNX Runtime: a graph of the bundle, on a CPU or a CUDA device.

The graph packs tokens itself and pads them around attention only, so batches go in as padded rows.
onnxruntime is imported when an engine is made, and torch never: two thread pools in one process
halve each other.

Memory of a CPU session is the stored bytes of the quantized linears (packed once more for the
kernels), or nothing where weights are plain: those stay mapped, and one matrix at a time is cast
to float32 right before its product. Latent attention's keys and values are packed too, and its MLP
is plain, but float32 in a session whose linears are grouped codes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Int8Channel, Plain
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.heap import passing_blocks_given_back
from lowmem.errors import BackendError, BundleError, CapacityError, import_failure
from lowmem.text.batching import PackedBatch

logger = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OUT_OF_MEMORY = (
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "available memory of",
    "alloc_failed",
)
_FATAL = 4

# Attention works on texts * longest² cells for each head. Up to so many, padding is not worth a
# pass of its own: 128 MiB of scores with 32 heads.
_FREE_CELLS = 2**20


class OnnxEngine:
    """One graph of one variant, ready to embed.

    Attributes:
        hidden_size: Length of a vector.
        waited_seconds: 0: weights are always there.
    """

    waited_seconds = 0.0

    def __init__(
        self, directory: Path, graph: str, contract: Contract, device: str, threads: int
    ) -> None:
        """Opens a session.

        Args:
            directory: The variant's directory.
            graph: Name of the graph's file in it.
            contract: The bundle's input contract.
            device: ``cpu`` or ``cuda``; nothing is left to another device than the one asked for.
            threads: CPU threads of the session.

        Raises:
            BackendError: onnxruntime or its provider is missing, or refuses the graph.
            BundleError: The variant is damaged, or the graph is not one of this contract.
            CapacityError: The weights do not fit.
        """
        onnxruntime = import_onnxruntime(device)
        checkpoint = Checkpoint(directory)
        self.hidden_size = checkpoint.config.hidden_size
        self._device = device
        self._one_pass = threading.Lock()
        self._has_pooling_mask = contract.pooling != "lasttoken"
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = _FATAL
        path = directory / graph
        open_session = _cuda_session if device == "cuda" else _cpu_session
        try:
            self._session = open_session(onnxruntime, path, checkpoint, threads)
        except BackendError:
            raise
        except Exception as error:  # all that the errors of onnxruntime have in common
            if _is_out_of_memory(error):
                raise CapacityError(
                    f"the weights of {directory.name} do not fit the memory of {device}: "
                    "choose a smaller variant"
                ) from error
            raise BackendError(f"onnxruntime cannot open {path}: {_line(error)}") from error
        inputs = {value.name for value in self._session.get_inputs()}
        expected = {"input_ids", "attention_mask"}
        if self._has_pooling_mask:
            expected.add("pooling_mask")
        if inputs != expected:
            raise BundleError(
                f"a graph of this contract takes {', '.join(sorted(expected))}, "
                f"got one that takes {', '.join(sorted(inputs))} ({path})"
            )

    def embed(self, batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Pooled vectors of each batch, float32 ``[texts, hidden_size]``, in its row order.

        They have unit length if the contract says so. Batches that do not fit the device's memory
        are split in two and tried again. Threads take turns at it: each would need the memory of
        a batch.

        Raises:
            CapacityError: A single text does not fit.
            BackendError: onnxruntime failed otherwise.
        """
        with self._one_pass:
            return [self._embed(batch.without_prefixes()) for batch in batches]

    def _embed(self, batch: PackedBatch) -> NDArray[np.float32]:
        vectors = np.empty((batch.texts, self.hidden_size), np.float32)
        for texts in _alike(np.diff(batch.cu_seqlens)):
            self._fill(vectors, batch, texts)
        return vectors

    def _fill(
        self, vectors: NDArray[np.float32], batch: PackedBatch, texts: NDArray[np.int64]
    ) -> None:
        """Computes some texts of a batch, in halves where memory runs out."""
        feeds = _padded(batch, texts)
        if not self._has_pooling_mask:
            del feeds["pooling_mask"]
        try:
            (vectors[texts],) = self._session.run(None, feeds, self._run_options)
            return
        except Exception as error:  # all that the errors of onnxruntime have in common
            if not _is_out_of_memory(error):
                raise BackendError(f"onnxruntime failed: {_line(error)}") from error
            if len(texts) == 1:
                tokens = feeds["input_ids"].size
                raise CapacityError(
                    f"a text of {tokens} tokens does not fit the memory of {self._device}"
                ) from error
        for half in np.array_split(texts, 2):
            self._fill(vectors, batch, half)


def import_onnxruntime(device: str) -> Any:
    """The module, checked to have a provider for the device.

    Raises:
        BackendError: It is not installed, cannot be imported, or is a build without that provider.
    """
    package, extra = ("onnxruntime-gpu", "cuda") if device == "cuda" else ("onnxruntime", "cpu")
    try:
        import onnxruntime
    except ImportError as error:
        purpose = "an onnxruntime plan"
        raise import_failure(error, "onnxruntime", package, extra, purpose) from error
    providers = onnxruntime.get_available_providers()
    if _PROVIDERS[device] not in providers:
        raise BackendError(
            f"a {device} plan of onnxruntime needs {_PROVIDERS[device]}, and this build has "
            f"{', '.join(providers)}: put {package} in the place of onnxruntime, "
            f"pip install 'lowmem[{extra}]'"
        )
    return onnxruntime


def session_options(onnxruntime: Any, threads: int) -> Any:
    """What all sessions have in common, self-tests included.

    Memory stays low because nodes run in the order of the file, which casts a weight right before
    its product (the default order casts most of them first), because a buffer goes back to the
    arena at its last use (reuse by later nodes of its shape would keep one of each shape), and
    because that one arena serves batches of every shape. Packed weights lie beside it.

    On x86 without VNNI 8-bit weights become unsigned, whose kernels do not saturate; elsewhere
    the entry changes nothing.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _cpu_session(onnxruntime: Any, path: Path, checkpoint: Checkpoint, threads: int) -> Any:
    options = session_options(onnxruntime, threads)
    kinds = {type(form) for form in checkpoint.formats.values()}
    disabled = []
    if kinds == {Plain}:
        # Anything above would cast every weight to float32 while the session opens, and keep it.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif kinds == {Int8Channel}:
        # The same for linears whose inputs are not rounded, and for 16-bit weights of a pooling.
        disabled += ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
    # Matrices are copied one by one before they are packed.
    with passing_blocks_given_back():
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=[("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})],
            disabled_optimizers=disabled,
            enable_fallback=0,
        )


def _cuda_session(onnxruntime: Any, path: Path, checkpoint: Checkpoint, threads: int) -> Any:
    options = session_options(onnxruntime, threads)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if hasattr(onnxruntime, "preload_dlls"):
        # Finds the CUDA libraries that pip installs; it prints what it does not find.
        with contextlib.redirect_stdout(io.StringIO()) as said:
            onnxruntime.preload_dlls(directory="")
        if said.getvalue():
            logger.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())
    settings = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    is_plain = all(isinstance(form, Plain) for form in checkpoint.formats.values())
    session = onnxruntime.InferenceSession(
        path,
        options,
        providers=[("CUDAExecutionProvider", settings)],
        # It would cast every weight on the host while the session opens, and keep it.
        disabled_optimizers=["ConstantFolding"] if is_plain else [],
        enable_fallback=0,
    )
    # A provider whose libraries do not load is left out without an error.
    if "CUDAExecutionProvider" not in session.get_providers():
        raise BackendError(
            "onnxruntime cannot load CUDAExecutionProvider: its CUDA or cuDNN libraries are "
            "missing or of another version than this build of onnxruntime-gpu needs"
        )
    return session


def _alike(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Groups of texts whose padding at most doubles tokens and the cost of attention.

    Args:
        lengths: Tokens of each text.

    Yields:
        Indices of texts, each once, longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    begin = 0
    for end in range(1, len(order) + 1):
        texts, longest = ordered[begin : end + 1], ordered[begin]
        cells = len(texts) * longest**2
        if (
            end == len(order)
            or len(texts) * longest > 2 * texts.sum()
            or cells > max(2 * (texts**2).sum(), _FREE_CELLS)
        ):
            yield order[begin:end]
            begin = end


def _padded(batch: PackedBatch, texts: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The graph's inputs for some texts, each int64 ``[texts, longest]``, padded on the right."""
    starts = batch.cu_seqlens[texts]
    lengths = batch.cu_seqlens[texts + 1] - starts
    columns = np.arange(lengths.max())
    mask = columns < lengths[:, None]
    places = (starts[:, None] + columns)[mask]
    feeds = {"attention_mask": mask.astype(np.int64)}
    for name, values in (
        ("input_ids", batch.input_ids),
        ("pooling_mask", batch.pooling_mask.astype(np.int64)),
    ):
        rows = np.zeros(mask.shape, np.int64)
        rows[mask] = values[places]
        feeds[name] = rows
    return feeds


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
