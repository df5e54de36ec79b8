"""Variants of the tiny checkpoints, packed by hand, and what transformers makes of their weights.

The quantizers here are the plainest there are: absolute maximum, round to nearest. Tests of
kernels and graphs need stored codes, not good ones.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, PreTrainedModel

from lowmem.artifact.formats import (
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    int_grouped,
    quantization_config,
)
from lowmem.artifact.latent_attention import PREFIX
from lowmem.artifact.tensors import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    RawTensor,
    TensorSpec,
    header_bytes,
)
from lowmem.artifact.weights import Checkpoint, LinearWeights, module_shapes


def write_variant(
    source: Path, directory: Path, form: Format | Mapping[str, Format], shards: int = 1
) -> Path:
    """Writes the model of one directory into another, its linears in another format.

    Args:
        source: A checkpoint with plain weights.
        directory: Where the variant goes; made if it is not there.
        form: The format of all linears, or of each.
        shards: How many safetensors files; with more than one there is an index.
    """
    checkpoint = Checkpoint(source)
    modules = module_shapes(checkpoint.config)
    formats = form if isinstance(form, Mapping) else dict.fromkeys(modules, form)
    tensors: dict[str, RawTensor] = {}
    for name, stored in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module not in modules:
            tensors[name] = stored.read()
            continue
        for suffix, tensor in quantize(formats[module], stored.read().float32()).items():
            tensors[f"{module}.{suffix}"] = tensor
    config = json.loads((source / "config.json").read_text())
    stanza = quantization_config(formats)
    if stanza is not None:
        config["quantization_config"] = stanza
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    named = {
        name if name.startswith(PREFIX) else checkpoint.prefix + name: tensor
        for name, tensor in tensors.items()
    }
    write_tensors(directory, named, shards)
    return directory


def write_tensors(directory: Path, tensors: Mapping[str, RawTensor], shards: int = 1) -> None:
    """Writes tensors as one safetensors file, or as shards with their index."""
    names = sorted(tensors)
    if shards == 1:
        parts = {SINGLE_FILE: names}
    else:
        parts = {
            f"model-{number + 1:05}-of-{shards:05}.safetensors": names[number::shards]
            for number in range(shards)
        }
        weight_map = {name: file for file, part in parts.items() for name in part}
        (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    for file, part in parts.items():
        specs = {name: TensorSpec(tensors[name].dtype, tensors[name].shape) for name in part}
        data = b"".join(tensors[name].array.tobytes() for name in part)
        (directory / file).write_bytes(header_bytes(specs) + data)


def write_sparse(directory: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Writes a safetensors file whose data is a hole of the right size."""
    header = header_bytes(specs)
    path = directory / SINGLE_FILE
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(spec.nbytes for spec in specs.values()))


def quantize(form: Format, weight: NDArray[np.float32]) -> dict[str, RawTensor]:
    """The tensors of one linear, by suffix, from float32 ``(out_features, in_features)``."""
    if isinstance(form, Plain):
        if form.dtype == "BF16":
            return {"weight": RawTensor("BF16", to_bfloat16(weight))}
        return {"weight": RawTensor(form.dtype, weight.astype(DTYPES[form.dtype]))}
    if isinstance(form, Int8Channel):
        scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        codes = np.rint(weight / scales).astype(np.int8)
        return {"weight": RawTensor("I8", codes), "weight_scale": RawTensor("F32", scales)}
    assert isinstance(form, IntGrouped), form
    largest = (1 << (form.bits - 1)) - 1
    groups = weight.reshape(len(weight), -1, form.group_size)
    scales = (np.abs(groups).max(axis=2) / largest).astype(np.float16)
    codes = np.rint(groups / scales[:, :, None].astype(np.float32))
    codes = codes.clip(-largest - 1, largest).astype(np.int8).reshape(weight.shape)
    return {
        "weight_packed": RawTensor("I32", int_grouped.pack(codes, form.bits)),
        "weight_scale": RawTensor("F16", scales),
        **form.constants(*weight.shape),
    }


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of values rounded to bfloat16."""
    bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy().view(np.uint16)


def oracle(
    source: Path,
    variant: Path,
    linear: Callable[[LinearWeights], torch.nn.Module] | None = None,
) -> PreTrainedModel:
    """The bare transformers model in float32, with a variant's weights.

    Args:
        source: The checkpoint that the variant was made of.
        variant: The variant.
        linear: Makes the module that takes the place of each linear; by default an ordinary one
            with the dequantized weight.
    """
    model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=torch.float32)
    checkpoint = Checkpoint(variant)
    plain = {
        name: torch.from_numpy(stored.map().float32().copy())
        for name, stored in checkpoint.tensors.items()
        if stored.dtype in ("F16", "BF16", "F32") and not name.endswith("_scale")
    }
    model.load_state_dict(
        {name: tensor for name, tensor in plain.items() if name in model.state_dict()},
        strict=False,
    )
    for layer in checkpoint.layers():
        for name, weights in layer.linears.items():
            module = model.get_submodule(f"layers.{layer.index}.{name}")
            if linear is None:
                dequantized = weights.format.dequantize(weights.tensors)
                module.weight.data = torch.from_numpy(dequantized.copy())
            else:
                model.set_submodule(f"layers.{layer.index}.{name}", linear(weights))
    model.train(False)
    return model
