"""llama.cpp for the benchmarks: its quantizer, and its embeddings of texts that are tokenized.

Needs ``pip install llama-cpp-python``, which builds llama.cpp for this processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from lowmem.compute.engine import unit_length
from lowmem.text.batching import EncodedText, PackedBatch, duplicates, pack

F16 = 1
"""Of ``llama_ftype`` and of ``ggml_type`` alike."""
TYPES = {"F16": F16, "Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7}
"""llama.cpp's names and numbers (``llama_ftype`` in its ``llama.h``)."""
_MOST_TEXTS = 64
# Kept, for llama.cpp calls it: a line for every tensor is more than anyone reads.
_SILENCE = llama_cpp.llama_log_callback(lambda level, text, data: None)


def quantize(source: Path, target: Path, name: str, threads: int) -> None:
    """llama.cpp's own quantizer; token embeddings stay in 16 bits, as they do in lowmem.

    Raises:
        SystemExit: It failed.
    """
    llama_cpp.llama_log_set(_SILENCE, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[name]
    params.allow_requantize = True
    params.token_embedding_type = F16
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if status:
        raise SystemExit(f"llama.cpp could not quantize {source}: status {status}")


class Embedder:
    """A GGUF file, with causal attention and the last token pooled."""

    def __init__(self, path: Path, threads: int, batch_tokens: int) -> None:
        """Loads it.

        Args:
            path: The file.
            threads: Of the arithmetic.
            batch_tokens: Most tokens of a pass, and of a text.

        Raises:
            SystemExit: It does not load.
        """
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENCE, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = batch_tokens
        params.n_seq_max = _MOST_TEXTS
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not load {path}")
        self._size = llama_cpp.llama_model_n_embd(self._model)
        self._batch_tokens = batch_tokens
        self._batch = llama_cpp.llama_batch_init(batch_tokens, 0, 1)

    def embed(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Unit vectors of tokenized texts, float32 ``[texts, hidden_size]``."""
        vectors = np.empty((len(texts), self._size), np.float32)
        for batch in pack(texts, self._batch_tokens, batch_size=_MOST_TEXTS):
            self._pass(batch, vectors)
        return unit_length(vectors[duplicates(texts)])

    def _pass(self, packed: PackedBatch, vectors: NDArray[np.float32]) -> None:
        batch = self._batch
        sequences = np.repeat(np.arange(packed.texts), np.diff(packed.cu_seqlens))
        columns = (packed.input_ids, packed.position_ids, sequences)
        for place, (token, position, sequence) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = True
        batch.n_tokens = packed.tokens
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        if status := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp could not embed: status {status}")
        for sequence, row in enumerate(packed.rows.tolist()):
            vector = llama_cpp.llama_get_embeddings_seq(self._context, sequence)
            vectors[row] = np.ctypeslib.as_array(vector, (self._size,))
