"""A model directory as weights by layer: the door between what lies on disk and what computes.

A directory is checked whole when it is opened: every tensor that the config calls for is there,
in the dtype and shape that its format says, and there is no other. Nothing is read until a layer
is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmem.artifact import strict_json
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.config_file import parse_config
from lowmem.artifact.formats import Format, Plain, check_groups, read_formats
from lowmem.artifact.tensors import (
    RawTensor,
    StoredTensor,
    TensorSpec,
    read_directory,
    some_names,
)
from lowmem.errors import BundleError

EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
_PREFIXES = ("model.", "embedding_model.")
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class LinearWeights:
    """One linear without bias: its format and that format's tensors, by suffix."""

    format: Format
    out_features: int
    in_features: int
    tensors: Mapping[str, RawTensor]


@dataclass(frozen=True)
class LayerWeights:
    """Everything one decoder layer needs.

    Attributes:
        index: Position in the stack, from 0.
        linears: Module name within the layer (``mlp.up_proj``) to its weights.
        norms: ``input_layernorm`` and ``post_attention_layernorm``, shape ``(hidden_size,)``.
    """

    index: int
    linears: Mapping[str, LinearWeights]
    norms: Mapping[str, RawTensor]


class Checkpoint:
    """An opened model directory: a Hugging Face checkpoint, or one variant of a bundle.

    Attributes:
        directory: Where it lies.
        config: The model's shape.
        formats: Module (``layers.0.mlp.up_proj``) to format.
        prefix: What stands before the decoder's tensors on disk: ``model.``,
            ``embedding_model.`` (NV-Embed's) or nothing.
        tensors: Tensor name without the prefix to where it lies.
    """

    def __init__(self, directory: Path) -> None:
        """Opens and checks a directory.

        Raises:
            BundleError: A file is missing or damaged, the architecture is not supported, or the
                tensors are not exactly those that the config calls for.
        """
        self.directory = directory
        path = directory / "config.json"
        value = strict_json.read_object(path)
        self.config = parse_config(value, str(path))
        stored = read_directory(directory)
        self.prefix = next((name for name in _PREFIXES if name + EMBEDDING in stored), "")
        self.tensors = {name.removeprefix(self.prefix): tensor for name, tensor in stored.items()}
        embedding = self.tensors.get(EMBEDDING)
        if embedding is None:
            raise BundleError(f"tensor {EMBEDDING} is missing ({directory})")
        if embedding.dtype not in _FLOATS:
            raise BundleError(
                f"{EMBEDDING} must be one of {', '.join(_FLOATS)}, "
                f"got {embedding.dtype} ({directory})"
            )
        if len(self.tensors) != len(stored):
            raise BundleError(f"a tensor stands with and without {self.prefix} ({directory})")
        modules = module_shapes(self.config)
        self.formats = read_formats(
            value.get("quantization_config"), modules, embedding.dtype, str(path)
        )
        self._check(embedding)

    @property
    def dtype(self) -> str:
        """Dtype of the embedding, which stands for all unquantized tensors: F16, BF16 or F32."""
        return self.tensors[EMBEDDING].dtype

    def embedding(self) -> RawTensor:
        """The token embeddings, mapped, ``(vocab_size, hidden_size)``."""
        return self.tensors[EMBEDDING].map()

    def final_norm(self) -> RawTensor:
        """Weight of the last norm, ``(hidden_size,)``."""
        return self.tensors[FINAL_NORM].map()

    def latent_attention(self) -> dict[str, RawTensor]:
        """The tensors of a pooling that has weights, mapped, by name; empty where it has none."""
        return {name: self.tensors[name].map() for name in latent_shapes(self.config)}

    def layer(
        self, index: int, read: Callable[[StoredTensor], RawTensor] = StoredTensor.map
    ) -> LayerWeights:
        """One layer's weights.

        Args:
            index: Position in the stack, from 0.
            read: ``StoredTensor.map`` leaves the bytes in the page cache, ``StoredTensor.read``
                copies them into memory.
        """
        return layer_weights(
            index, self.config, self.formats, lambda name: read(self.tensors[name])
        )

    def layers(
        self, read: Callable[[StoredTensor], RawTensor] = StoredTensor.map
    ) -> Iterator[LayerWeights]:
        """All layers in order, each read when it is reached."""
        for index in range(self.config.num_hidden_layers):
            yield self.layer(index, read)

    def _check(self, embedding: StoredTensor) -> None:
        config, problems = self.config, []
        expected: dict[str, TensorSpec] = {
            EMBEDDING: TensorSpec(embedding.dtype, (config.vocab_size, config.hidden_size)),
            FINAL_NORM: TensorSpec(embedding.dtype, (config.hidden_size,)),
        }
        for index in range(config.num_hidden_layers):
            for norm in NORMS:
                name = f"layers.{index}.{norm}.weight"
                expected[name] = TensorSpec(embedding.dtype, (config.hidden_size,))
        for name, sizes in latent_shapes(config).items():
            expected[name] = TensorSpec(embedding.dtype, sizes)
        floats = set(expected)
        for module, shape in module_shapes(config).items():
            form = self.formats[module]
            check_groups(form, shape[1], f"{module} of {self.directory}")
            specs = {f"{module}.{suffix}": spec for suffix, spec in form.specs(*shape).items()}
            expected |= specs
            if isinstance(form, Plain):
                floats |= specs.keys()
        for name, spec in expected.items():
            found = self.tensors.get(name)
            if found is None:
                problems.append(f"tensor {name} is missing")
            elif found.shape != spec.shape:
                problems.append(f"{name} must have shape {spec.shape}, got {found.shape}")
            elif found.dtype != spec.dtype and not (name in floats and found.dtype in _FLOATS):
                problems.append(f"{name} must be {spec.dtype}, got {found.dtype}")
        extra = [name for name in self.tensors.keys() - expected.keys() if not _inert(name)]
        if extra:
            problems.append(f"unexpected tensors: {some_names(extra)}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise BundleError(
                f"{self.directory} does not hold the model of its config.json: "
                + "; ".join(problems[:5])
                + more
            )


def layer_weights(
    index: int,
    config: ModelConfig,
    formats: Mapping[str, Format],
    tensor: Callable[[str], RawTensor],
) -> LayerWeights:
    """One layer's weights, from wherever its tensors are.

    Args:
        index: Position in the stack, from 0.
        config: The model's shape.
        formats: Format of every linear, by module.
        tensor: Gives a tensor by its name, ``layers.0.mlp.up_proj.weight``.
    """
    linears = {}
    for name, shape in config.linears().items():
        module = f"layers.{index}.{name}"
        form = formats[module]
        tensors = {suffix: tensor(f"{module}.{suffix}") for suffix in form.specs(*shape)}
        linears[name] = LinearWeights(form, *shape, tensors)
    norms = {norm: tensor(f"layers.{index}.{norm}.weight") for norm in NORMS}
    return LayerWeights(index, linears, norms)


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear of the stack, ``layers.0.self_attn.q_proj`` first, to (out, in) features."""
    return {
        f"layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in config.linears().items()
    }


def latent_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a pooling that has weights to their shapes; empty where it has none."""
    latents = config.latent_attention
    return {} if latents is None else latents.shapes(config.hidden_size)


def _inert(name: str) -> bool:
    """An output head computes no embedding; old checkpoints also store RoPE's frequencies."""
    return name == "lm_head.weight" or name.endswith("self_attn.rotary_emb.inv_freq")
