"""How torch says that memory is used up."""

from __future__ import annotations

import torch

# torch says only in words that the host's memory, or that of cuBLAS, is used up. The last one is
# said where not even the library's own workspace fits.
_WORDS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "out of memory",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory is used up, the host's or a device's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _WORDS
    )
