"""Random variants of a true shape, written as fast as the disk takes them.

One layer is drawn and quantized, and stands in every place of the stack: each place has bytes of
its own on disk and in memory, so that sizes and speeds are those of a real model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from random_checkpoint import random_weights

from lowmem.artifact import strict_json
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.config_file import config_json
from lowmem.artifact.formats import (
    Format,
    Int8Channel,
    Plain,
    int_grouped,
    quantization_config,
)
from lowmem.artifact.tensors import INDEX_FILE, RawTensor, TensorSpec, header_bytes
from lowmem.artifact.variants import LOW
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, module_shapes

FORMATS: dict[str, Format] = {
    "fp16": Plain("BF16"),
    "int8": Int8Channel(),
    "int4": LOW,
}


def write_variants(directory: Path, config: ModelConfig) -> None:
    """Writes ``fp16`` (whose 16 bits are bf16), ``int8`` and ``int4``; what is there is kept."""
    random = np.random.default_rng(0)
    linears = {
        name: random_weights(TensorSpec("F32", shape), random)
        for name, shape in config.linears().items()
    }
    norm = random_weights(TensorSpec("F32", (config.hidden_size,)), random)
    embedding = random.standard_normal((config.vocab_size, config.hidden_size), np.float32)
    ends = {EMBEDDING: _bf16(embedding), FINAL_NORM: _bf16(norm)}
    for variant, form in FORMATS.items():
        folder = directory / variant
        if (folder / INDEX_FILE).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        layer = {f"{name}.weight": _bf16(norm) for name in NORMS}
        for name, weight in linears.items():
            stored = _quantize(form, weight)
            layer |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        weight_map = _write(folder / "ends.safetensors", ends)
        for index in range(config.num_hidden_layers):
            named = {f"layers.{index}.{name}": tensor for name, tensor in layer.items()}
            weight_map |= _write(folder / f"layer-{index:02}.safetensors", named)
        stanza = quantization_config(dict.fromkeys(module_shapes(config), form))
        written = config_json(config, "bfloat16")
        if stanza is not None:
            written["quantization_config"] = stanza
        (folder / "config.json").write_text(strict_json.dumps(written))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index))


def _quantize(form: Format, weight: np.ndarray) -> dict[str, RawTensor]:
    """Absolute maximum, round to nearest: sizes matter here, not fidelity."""
    rows, columns = weight.shape
    if isinstance(form, Plain):
        return {"weight": _bf16(weight)}
    if isinstance(form, Int8Channel):
        scales = np.abs(weight).max(1, keepdims=True) / 127
        codes = np.rint(weight / scales).astype(np.int8)
        return {"weight": RawTensor("I8", codes), "weight_scale": RawTensor("F32", scales)}
    groups = weight.reshape(rows, -1, form.group_size)
    scales = (np.abs(groups).max(2) / 7).astype(np.float16)
    codes = np.clip(np.rint(groups / scales[..., None].astype(np.float32)), -8, 7)
    packed = int_grouped.pack(codes.astype(np.int8).reshape(rows, columns), 4)
    return {
        "weight_packed": RawTensor("I32", packed),
        "weight_scale": RawTensor("F16", scales),
        **form.constants(rows, columns),
    }


def _bf16(values: np.ndarray) -> RawTensor:
    return RawTensor("BF16", ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16))


def _write(path: Path, tensors: dict[str, RawTensor]) -> dict[str, str]:
    """One safetensors file; returns its part of the index."""
    specs = {name: TensorSpec(raw.dtype, raw.shape) for name, raw in tensors.items()}
    with path.open("wb") as file:
        file.write(header_bytes(specs))
        for raw in tensors.values():
            file.write(np.ascontiguousarray(raw.array).data.cast("B"))
    return dict.fromkeys(tensors, path.name)
