"""Where every tensor of a variant will lie, fixed before its first byte is written.

Tensors come in the order of the groups that export works on (embedding, each layer, final norm,
what a pooling has of its own), so that a file is written front to back. Tensors whose content the
format already knows come last, those of wide dtypes first: some are single bytes or text of any
length, and would leave all that follows them unaligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.formats import Format, check_groups
from lowmem.artifact.tensors import DTYPES, RawTensor, TensorSpec, header_bytes
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, latent_shapes, module_shapes


@dataclass(frozen=True)
class Layout:
    """One safetensors file, planned.

    Attributes:
        header: Its first bytes.
        specs: Tensor name to dtype and shape, in file order.
        offsets: Tensor name to its byte offset in the file.
        constants: Tensors whose content is known already.
        size: Bytes of the whole file.
    """

    header: bytes
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    constants: Mapping[str, RawTensor]
    size: int


def lay_out(config: ModelConfig, dtype: str, formats: Mapping[str, Format]) -> Layout:
    """Lays out a variant's file.

    Args:
        config: The model's shape.
        dtype: F16 or BF16: dtype of everything but the linears.
        formats: Module to format, for every linear.

    Raises:
        BundleError: The groups of a format do not fill the rows of a linear.
    """
    hidden = TensorSpec(dtype, (config.hidden_size,))
    specs = {EMBEDDING: TensorSpec(dtype, (config.vocab_size, config.hidden_size))}
    constants: dict[str, RawTensor] = {}
    constant_specs: dict[str, TensorSpec] = {}
    shapes = module_shapes(config)
    for index in range(config.num_hidden_layers):
        for norm in NORMS:
            specs[f"layers.{index}.{norm}.weight"] = hidden
        for linear in config.linears():
            module = f"layers.{index}.{linear}"
            form = formats[module]
            check_groups(form, shapes[module][1], module)
            known = form.constants(*shapes[module])
            constants |= {f"{module}.{suffix}": raw for suffix, raw in known.items()}
            for suffix, spec in form.specs(*shapes[module]).items():
                place = constant_specs if suffix in known else specs
                place[f"{module}.{suffix}"] = spec
    specs[FINAL_NORM] = hidden
    specs |= {name: TensorSpec(dtype, shape) for name, shape in latent_shapes(config).items()}
    specs |= dict(sorted(constant_specs.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize))
    header = header_bytes(specs)
    offsets, end = {}, len(header)
    for name, spec in specs.items():
        offsets[name] = end
        end += spec.nbytes
    return Layout(header, specs, offsets, constants, end)
