import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.layout import Layout, lay_out
from export.writer import TensorWriter
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped, Plain
from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.artifact.tensors import DTYPES, RawTensor, read_header
from lowmem.artifact.weights import module_shapes
from lowmem.errors import BundleError
from tests.shapes import SEVEN_B

# Other processes may hold the cores for seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FORMATS: tuple[Format, ...] = (
    Plain("F16"),
    Int8Channel(),
    IntGrouped(bits=4, group_size=64),
    IntGrouped(bits=8, group_size=64),
    BnbInt8(),
    BnbNf4(),
)


def model(
    hidden: int = 128, inner: int = 192, vocabulary: int = 97, layers: int = 2
) -> ModelConfig:
    return ModelConfig(
        model_type="mistral",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=256,
        sliding_window=None,
    )


def laid_out(config: ModelConfig, *forms: Format) -> Layout:
    """Modules take the formats in turn."""
    modules = module_shapes(config)
    return lay_out(config, "F16", {name: forms[i % len(forms)] for i, name in enumerate(modules)})


def check_places(layout: Layout) -> None:
    end = len(layout.header)
    for name, spec in layout.specs.items():
        assert layout.offsets[name] == end
        assert layout.offsets[name] % DTYPES[spec.dtype].itemsize == 0, name
        end += spec.nbytes
    assert layout.size == end
    assert layout.offsets.keys() == layout.specs.keys()


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_tensors_lie_end_to_end_and_aligned(form: Format) -> None:
    check_places(laid_out(model(), form))


@given(
    forms=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=7),
    hidden=st.integers(1, 5).map(lambda count: 64 * count),
    inner=st.integers(1, 5).map(lambda count: 64 * count),
    vocabulary=st.integers(1, 999),
    layers=st.integers(1, 12),
)
@UNHURRIED
def test_tensors_of_any_model_and_mixture_lie_end_to_end_and_aligned(
    forms: list[Format], hidden: int, inner: int, vocabulary: int, layers: int
) -> None:
    check_places(laid_out(model(hidden, inner, vocabulary, layers), *forms))


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_bulk_tensors_of_a_7b_model_begin_on_cache_lines(form: Format) -> None:
    layout = laid_out(model(4096, 14336, 32000, 32), form)
    for name in layout.specs.keys() - layout.constants.keys():
        assert layout.offsets[name] % 64 == 0


def test_tensors_come_in_the_order_they_are_written() -> None:
    layout = laid_out(model(layers=1), Int8Channel())
    layer = "layers.0."
    expected = ["embed_tokens.weight"]
    expected += [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"]
    for linear in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"):
        expected += [f"{layer}{linear}_proj.weight", f"{layer}{linear}_proj.weight_scale"]
    for linear in ("mlp.gate", "mlp.up", "mlp.down"):
        expected += [f"{layer}{linear}_proj.weight", f"{layer}{linear}_proj.weight_scale"]
    assert list(layout.specs) == [*expected, "norm.weight"]


@pytest.mark.parametrize(
    ("form", "count"), [(IntGrouped(), 1), (BnbInt8(), 1), (BnbNf4(), 2), (Int8Channel(), 0)]
)
def test_constants_come_last(form: Format, count: int) -> None:
    layout = laid_out(model(layers=2), form)
    assert len(layout.constants) == count * 14
    assert set(list(layout.specs)[-count * 14 :] if count else []) == layout.constants.keys()


def test_the_header_holds_what_transformers_asks_for_and_ends_on_a_cache_line() -> None:
    header = laid_out(model(), BnbNf4()).header
    assert len(header) % 64 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


def test_equal_inputs_give_equal_headers() -> None:
    assert laid_out(model(), *FORMATS).header == laid_out(model(), *FORMATS).header


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_the_safetensors_library_reads_what_is_written(form: Format, tmp_path: Path) -> None:
    layout = laid_out(model(), form)
    noise = np.random.default_rng(0)
    written: dict[str, RawTensor] = dict(layout.constants)
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, layout) as writer:
        for name, spec in layout.specs.items():
            if name not in layout.constants:
                data = noise.integers(0, 100, spec.nbytes, np.uint8).tobytes()
                array = np.frombuffer(data, DTYPES[spec.dtype]).reshape(spec.shape)
                written[name] = RawTensor(spec.dtype, array)
                writer.write(name, written[name])
        writer.finish()
    assert path.stat().st_size == layout.size
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == written.keys()
    for name, raw in written.items():
        np.testing.assert_array_equal(loaded[name], raw.array, strict=True)
    stored = read_header(path)
    assert {name: tensor.offset for name, tensor in stored.items()} == dict(layout.offsets)
    assert {name: tensor.spec for name, tensor in stored.items()} == dict(layout.specs)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_weights_of_a_pooling_lie_in_16_bits_behind_the_final_norm(form: Format) -> None:
    latents = LatentAttentionConfig(5, 2, 24)
    layout = laid_out(replace(model(), is_stock=False, latent_attention=latents), form)
    check_places(layout)
    names = list(layout.specs)
    behind = names[names.index("norm.weight") + 1 :][:14]
    assert behind == list(latents.shapes(128))
    for name, shape in latents.shapes(128).items():
        assert (layout.specs[name].dtype, layout.specs[name].shape) == ("F16", shape)


@pytest.mark.parametrize("form", [IntGrouped(8, 64), BnbNf4()], ids=repr)
def test_groups_that_do_not_fill_a_row_are_refused(form: Format) -> None:
    config = replace(SEVEN_B, intermediate_size=200)
    formats = dict.fromkeys(module_shapes(config), form)
    place = "layers.0.mlp.down_proj"
    with pytest.raises(BundleError, match=rf"group_size=64 and in_features=200 \({place}\)"):
        lay_out(config, "F16", formats)
