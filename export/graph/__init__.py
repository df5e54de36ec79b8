"""ONNX graphs of a variant, over the very bytes of its safetensors.

A graph is a few hundred kilobytes of nodes; its weights are the variant's own files, found by
offset, and for latent attention two small matrices in a file of their own. It takes padded ids and
a mask, and gives pooled (and, if the contract says so, normalised) vectors; see ``packing`` for
what lies between.

ONNX Runtime reads external data that has more than one hard link, as bundles have; ``onnx`` and
``onnx_ir`` refuse to, so nothing here lets them open it.
"""

from __future__ import annotations

from pathlib import Path

from export.graph.builder import save
from export.graph.decoder import build
from export.graph.latent_attention import write_folded
from export.graph.linears import is_supported
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Int8Channel, IntGrouped, Plain
from lowmem.artifact.weights import Checkpoint

_HEAD_MULTIPLE = 16
"""ONNX Runtime's causal attention refuses other head sizes when it runs."""
_MODEL = "model.onnx"
_MODEL_INT8 = "model_int8.onnx"
_MODEL_FP16 = "model_fp16.onnx"


def write_graphs(directory: Path, contract: Contract) -> dict[str, str]:
    """Writes the graphs that a variant's formats allow, beside its weights.

    The same variant and contract give the same bytes.

    Args:
        directory: The variant's directory, complete but for the graphs.
        contract: The bundle's input contract.

    Returns:
        As ``graphs_of``.

    Raises:
        BundleError: The directory does not hold a whole variant.
    """
    checkpoint = Checkpoint(directory)
    graphs = graphs_of(checkpoint, contract)
    if graphs and contract.pooling == "latent_attention":
        write_folded(checkpoint)
    for name, compute in graphs.items():
        save(build(checkpoint, contract, compute), directory / name)
    return graphs


def graphs_of(checkpoint: Checkpoint, contract: Contract) -> dict[str, str]:
    """The graphs that a variant's formats allow.

    Args:
        checkpoint: The variant.
        contract: The bundle's input contract.

    Returns:
        File name to compute, empty where no operator of ONNX Runtime takes formats or heads:

        * 16-bit weights: ``model.onnx`` ``fp32``; with float16 also ``model_fp16.onnx`` ``fp16``,
          for CUDA;
        * grouped codes: ``model.onnx`` ``fp32`` and ``model_int8.onnx`` ``int8``;
        * channel codes: ``model.onnx`` ``int8``, or ``fp32`` if no linear rounds its inputs;
        * bitsandbytes' formats, mixtures of the above, and groups of another size than 16, 32,
          64, 128 or 256: none;
        * causal attention with a ``head_dim`` that is no multiple of 16: none.
    """
    if contract.is_causal and checkpoint.config.head_dim % _HEAD_MULTIPLE:
        return {}
    forms = set(checkpoint.formats.values())
    kinds = {type(form) for form in forms}
    if not all(map(is_supported, forms)):
        return {}
    if kinds == {Plain}:
        stored = {checkpoint.tensors[f"{module}.weight"].dtype for module in checkpoint.formats}
        halves = {_MODEL_FP16: "fp16"} if stored == {"F16"} else {}
        return {_MODEL: "fp32", **halves}
    if kinds == {IntGrouped}:
        return {_MODEL: "fp32", _MODEL_INT8: "int8"}
    if kinds == {Int8Channel}:
        rounds = any(form.rounds_activations for form in forms if isinstance(form, Int8Channel))
        return {_MODEL: "int8" if rounds else "fp32"}
    return {}
