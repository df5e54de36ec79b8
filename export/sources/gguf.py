"""A llama.cpp model file as a source.

GGUF keeps Hugging Face's tensors under other names, with the rows of q and k in another order, and
mostly quantized. Each tensor is dequantized by the gguf package, block by block, and rounded once
to F16, which from here on is the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.sources.gguf_header import GgufTensor, read_header
from export.sources.gguf_tokenizer import tokenizer_files
from export.sources.stated import Stated
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import parse_config
from lowmem.artifact.tensors import RawTensor, StoredTensor, some_names
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM
from lowmem.disk import shown_name
from lowmem.errors import BundleError, import_failure

if TYPE_CHECKING:
    from types import ModuleType

_BLOCK_BYTES = 8 * 2**20  # of float32, at a time

# Keys of the metadata, less "llama.", to what config.json calls them.
_SHAPE = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
}
# Keys that change the maths, with the value under which they do not.
_NEUTRAL = {
    "rope.scaling.type": "none",
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
}
_OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTPUT_HEAD = "output.weight"  # computes no embedding


class GgufFile:
    """A ``.gguf`` file of the llama architecture with a byte-level tokenizer."""

    dtype = "F16"
    shards = None
    revision = None

    def __init__(self, path: Path) -> None:
        """Opens and checks the file; no weight is read.

        Raises:
            BundleError: The file is damaged, or holds a model or tokenizer that is not supported.
            BackendError: The package gguf is not installed.
        """
        self._gguf = _library()
        self._path = path
        metadata, tensors = read_header(path)
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise BundleError(f"general.architecture must be llama, got {architecture!r} ({path})")
        self._tokenizer_files = tokenizer_files(metadata, str(path))
        self.name = shown_name(path)
        self.config = _config(metadata, path)
        licence = metadata.get("general.license")
        self.stated = Stated()
        self.licence = licence if isinstance(licence, str) else None
        self._blocks = _known_blocks(self._gguf, {tensor.type for tensor in tensors.values()})
        self._tensors = self._checked(tensors)

    def tensor(self, name: str) -> RawTensor:
        """One tensor, dequantized and rounded to F16; one block of it at a time is in float32.

        Raises:
            BundleError: A value is not finite or does not fit F16, or the file has become shorter.
        """
        tensor = self._tensors[name]
        kind = self._gguf.GGMLQuantizationType(tensor.type)
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        row_bytes = self._row_bytes(tensor)
        array = np.empty((rows, columns), np.float16)
        step = max(1, _BLOCK_BYTES // (columns * 4))
        for row in range(0, rows, step):
            shape, offset = (min(step, rows - row), row_bytes), tensor.offset + row * row_bytes
            data = StoredTensor("U8", shape, self._path, offset).read().array
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
                block = self._gguf.dequantize(data, kind)
                rounded = block.astype(np.float16)
            finite = np.isfinite(rounded)
            if not finite.all():
                place = f"{self._path}, tensor {name}"
                raise BundleError(
                    f"a weight must be finite and fit F16, got {block[~finite][0]} ({place})"
                )
            array[row : row + step] = rounded
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is not None:
            array = _in_halves(array, heads)
        return RawTensor("F16", array.reshape(tensor.shape))

    def tokenizer_files(self) -> dict[str, bytes]:
        """``tokenizer.json`` and ``tokenizer_config.json``, made from the metadata."""
        return dict(self._tokenizer_files)

    def files(self) -> list[Path]:
        """The file itself."""
        return [self._path]

    def _checked(self, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
        """The tensors by Hugging Face's names, if they are those of the config."""
        expected = dict(_expected(self.config))
        size = self._path.stat().st_size
        problems = []
        found = {}
        for name, (renamed, shape) in expected.items():
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"tensor {name} is missing")
            elif tensor.shape != shape:
                problems.append(f"{name} must have shape {shape}, got {tensor.shape}")
            elif problem := self._unreadable(tensor, size):
                problems.append(f"{name} {problem}")
            else:
                found[renamed] = tensor
        extra = tensors.keys() - expected.keys() - {_OUTPUT_HEAD}
        if extra:
            problems.append(f"tensors that may change the maths: {some_names(extra)}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise BundleError(f"{self._path} cannot be served: " + "; ".join(problems[:5]) + more)
        return found

    def _unreadable(self, tensor: GgufTensor, size: int) -> str | None:
        """Why the bytes of a tensor cannot be read, or None."""
        if tensor.type not in self._blocks:
            return f"is of ggml type {tensor.type}, which the package gguf does not dequantize"
        numbers, _ = self._blocks[tensor.type]
        if tensor.shape[-1] % numbers:
            return f"has rows of {tensor.shape[-1]} numbers, not a multiple of {numbers}"
        if tensor.offset + math.prod(tensor.shape[:-1]) * self._row_bytes(tensor) > size:
            return "goes past the end of the file, which is truncated"
        return None

    def _row_bytes(self, tensor: GgufTensor) -> int:
        numbers, block_bytes = self._blocks[tensor.type]
        return tensor.shape[-1] // numbers * block_bytes


def _known_blocks(gguf: ModuleType, kinds: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Numbers and bytes of a block, of those ggml types that can be dequantized."""
    known = {}
    for number in kinds:
        try:
            kind = gguf.GGMLQuantizationType(number)
            numbers, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            continue
        known[number] = (numbers, block_bytes)
    return known


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise import_failure(error, "gguf", "gguf", "export", "reading .gguf files") from error
    return gguf


def _config(metadata: Mapping[str, Any], path: Path) -> ModelConfig:
    """The shape, in the words of config.json so that the rules of config.json hold for it."""
    own = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    value: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu"}
    value |= {name: own.get(key) for key, name in _SHAPE.items()}
    value["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    config = parse_config(value, str(path))
    neutral = _NEUTRAL | {
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    problems = [
        f"{key}={got!r} changes the maths and is not supported"
        for key, got in own.items()
        if key not in _SHAPE and got != neutral.get(key)
    ]
    if metadata.get("general.type", "model") != "model":
        problems.append(f"general.type must be model, got {metadata['general.type']!r}")
    if metadata.get("split.count", 1) not in (0, 1):
        problems.append("it is one part of a split model: merge the parts with gguf-split")
    if problems:
        raise BundleError(f"{path} cannot be served: " + "; ".join(problems))
    return config


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """GGUF's name of each tensor, with Hugging Face's name and the shape."""
    embedding, norm = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    shapes = {"input_layernorm": norm, "post_attention_layernorm": norm, **config.linears()}
    for name, renamed in _OUTSIDE.items():
        yield name, (renamed, embedding if renamed == EMBEDDING else norm)
    for index in range(config.num_hidden_layers):
        for name, module in _INSIDE.items():
            renamed = f"layers.{index}.{module}.weight"
            yield f"blk.{index}.{name}.weight", (renamed, shapes[module])


def _in_halves(array: NDArray[np.float16], heads: int) -> NDArray[np.float16]:
    """Rows of q or k with the two parts of each rotated pair half a head apart again.

    llama.cpp rotates neighbouring rows, Hugging Face row i with row i + head_dim / 2.
    """
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)  # [heads, pairs, 2, in]
    return pairs.swapaxes(1, 2).reshape(rows, columns)
