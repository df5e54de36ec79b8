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
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Plain
from lowmem.artifact.variants import graphs_for
from lowmem.artifact.weights import Checkpoint


def write_graphs(directory: Path, contract: Contract) -> dict[str, str]:
    """Writes the graphs that a variant's formats allow, beside its weights.

    The same variant and contract give the same bytes.

    Args:
        directory: The variant's directory, complete but for the graphs.
        contract: The bundle's input contract.

    Returns:
        File name to compute, as ``graphs_for``.

    Raises:
        BundleError: The directory does not hold a whole variant.
    """
    checkpoint = Checkpoint(directory)
    # Linears may be stored in another dtype than the embedding, which stands for all of them.
    formats = {
        module: Plain(checkpoint.tensors[f"{module}.weight"].dtype)
        if isinstance(form, Plain)
        else form
        for module, form in checkpoint.formats.items()
    }
    graphs = graphs_for(formats, checkpoint.config.head_dim, is_causal=contract.is_causal)
    if graphs and contract.pooling == "latent_attention":
        write_folded(checkpoint)
    for name, compute in graphs.items():
        save(build(checkpoint, contract, compute), directory / name)
    return graphs
