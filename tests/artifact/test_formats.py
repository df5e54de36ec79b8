import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from lowmem.artifact.formats import (
    BnbInt8,
    BnbNf4,
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    bnb_nf4,
    int_grouped,
    quantization_config,
    read_formats,
)
from lowmem.artifact.tensors import RawTensor, TensorSpec
from lowmem.errors import BundleError

# Other processes may hold the cores for seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Layer 1 and layer 11: a pattern for one must not match the other.
MODULES = tuple(
    f"layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)
QUANTIZED: tuple[Format, ...] = (
    Int8Channel(),
    Int8Channel(rounds_activations=False),
    IntGrouped(bits=4, group_size=64),
    IntGrouped(bits=4, group_size=32),
    IntGrouped(bits=8, group_size=128),
    BnbInt8(),
    BnbNf4(dtype="float16"),
    BnbNf4(dtype="bfloat16"),
)
MIXTURES: tuple[tuple[Format, ...], ...] = (
    (IntGrouped(bits=4), IntGrouped(bits=8), Plain("F16")),
    (IntGrouped(bits=4, group_size=32), IntGrouped(bits=4, group_size=128)),
    (Int8Channel(), IntGrouped(bits=4), Plain("BF16")),
    (Int8Channel(), Int8Channel(rounds_activations=False), Plain("F16")),
    (Int8Channel(), Plain("F16")),
    (IntGrouped(bits=4), Plain("F16")),
    (BnbInt8(), Plain("F16")),
    (BnbNf4(), Plain("F16")),
)


def test_the_first_code_of_four_bits_lies_in_the_low_nibble_plus_eight() -> None:
    codes = np.array([[-8, -7, -1, 0, 1, 2, 6, 7], [7, -8, 0, 0, 0, 0, -8, 7]], np.int8)
    packed = int_grouped.pack(codes, bits=4)
    assert packed.dtype == np.int32
    assert packed.shape == (2, 1)
    assert packed.tobytes() == bytes([0x10, 0x87, 0xA9, 0xFE, 0x0F, 0x88, 0x88, 0xF0])


def test_codes_of_eight_bits_are_stored_plus_128() -> None:
    codes = np.array([[-128, -127, -1, 0], [1, 2, 126, 127]], np.int8)
    packed = int_grouped.pack(codes, bits=8)
    assert packed.dtype == np.int32
    assert packed.shape == (2, 1)
    assert packed.tobytes() == bytes([0x00, 0x01, 0x7F, 0x80, 0x81, 0x82, 0xFE, 0xFF])


def test_element_i_of_a_packed_row_takes_bits_from_i_times_bits() -> None:
    for bits in (4, 8):
        codes = np.arange(64, dtype=np.int8)[None] % 8
        (row,) = int_grouped.pack(codes, bits)
        string = int.from_bytes(row.tobytes(), "little")
        found = [(string >> (i * bits)) % (1 << bits) - (1 << (bits - 1)) for i in range(64)]
        assert found == codes[0].tolist()


def test_the_first_nf4_code_lies_in_the_high_nibble() -> None:
    packed = bnb_nf4.pack(np.array([[1, 2, 15, 0], [8, 7, 0, 15]], np.uint8))
    assert packed.dtype == np.uint8
    assert packed.shape == (4, 1)
    assert packed.tobytes() == bytes([0x12, 0xF0, 0x87, 0x0F])


@given(
    st.sampled_from([4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            arrays(
                np.int8,
                st.tuples(st.integers(1, 5), st.integers(1, 6).map(lambda words: 8 * words)),
                elements=st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
            ),
        )
    )
)
@UNHURRIED
def test_unpacking_undoes_packing_of_grouped_codes(case: tuple[int, NDArray[np.int8]]) -> None:
    bits, codes = case
    packed = int_grouped.pack(codes, bits)
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(int_grouped.unpack(packed, bits), codes, strict=True)


@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda pairs: 2 * pairs)),
        elements=st.integers(0, 15),
    )
)
@UNHURRIED
def test_unpacking_undoes_packing_of_nf4_codes(codes: NDArray[np.uint8]) -> None:
    packed = bnb_nf4.pack(codes)
    assert packed.nbytes * 2 == codes.size
    np.testing.assert_array_equal(bnb_nf4.unpack(packed), codes.reshape(-1), strict=True)


def test_a_view_with_strides_is_packed_as_what_it_shows() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).repeat(2).reshape(2, 16)
    strided = np.repeat(codes, 2, axis=1)[:, ::2]
    for bits in (4, 8):
        packed = int_grouped.pack(strided, bits)
        np.testing.assert_array_equal(packed, int_grouped.pack(codes, bits))
        wide = np.repeat(packed, 2, axis=1)[:, ::2]
        np.testing.assert_array_equal(int_grouped.unpack(wide, bits), codes)


def test_plain_weights_are_widened() -> None:
    halves = RawTensor("F16", np.array([[1.5, -65504.0]], np.float16))
    brain = RawTensor("BF16", np.array([[0x3FC0, 0xC000]], np.uint16))
    assert Plain("F16").dequantize({"weight": halves}).tolist() == [[1.5, -65504.0]]
    assert Plain("BF16").dequantize({"weight": brain}).tolist() == [[1.5, -2.0]]
    assert Plain("BF16").dequantize({"weight": brain}).dtype == np.float32


def test_a_channel_code_counts_scales_of_its_row() -> None:
    weight = Int8Channel().dequantize(
        {
            "weight": RawTensor("I8", np.array([[-127, 0, 64], [1, 2, -3]], np.int8)),
            "weight_scale": RawTensor("F32", np.array([[0.5], [2.0]], np.float32)),
        }
    )
    assert weight.tolist() == [[-63.5, 0.0, 32.0], [2.0, 4.0, -6.0]]
    assert weight.dtype == np.float32


def test_a_bitsandbytes_code_counts_127ths_of_the_largest_weight_of_its_row() -> None:
    weight = BnbInt8().dequantize(
        {
            "weight": RawTensor("I8", np.array([[-127, 0, 127], [1, 2, -3], [5, 0, 0]], np.int8)),
            "SCB": RawTensor("F32", np.array([254.0, 127.0, 0.0], np.float32)),
            "weight_format": RawTensor("U8", np.zeros((), np.uint8)),
        }
    )
    assert weight.tolist() == [[-254.0, 0.0, 254.0], [1.0, 2.0, -3.0], [0.0, 0.0, 0.0]]
    assert weight.dtype == np.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grouped_code_counts_scales_of_its_group(bits: int) -> None:
    codes = np.array([[-8, 7, 0, 1, 2, 3, 4, 5, -8, 7, 0, 1, 2, 3, 4, 5]], np.int8)
    weight = IntGrouped(bits=bits, group_size=8).dequantize(
        {
            "weight_packed": RawTensor("I32", int_grouped.pack(codes, bits)),
            "weight_scale": RawTensor("F16", np.array([[0.5, 2.0]], np.float16)),
            "weight_shape": RawTensor("I64", np.array([1, 16])),
        }
    )
    first, second = [-4.0, 3.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [-16.0, 14, 0, 2, 4, 6, 8, 10]
    assert weight.tolist() == [[*first, *second]]
    assert weight.dtype == np.float32


def test_nf4_codes_pick_from_the_book_times_the_largest_weight_of_their_block() -> None:
    form = BnbNf4(group_size=64)
    codes = np.full((2, 64), 7, np.uint8)  # 7 is zero
    codes[0, :3] = [0, 15, 11]
    codes[1, 63] = 14
    weight = form.dequantize(
        {
            "weight": RawTensor("U8", bnb_nf4.pack(codes)),
            "weight.absmax": RawTensor("F32", np.array([2.0, 0.5], np.float32)),
            "weight.quant_map": form.constant("weight.quant_map", 2, 64),
            bnb_nf4.STATE: form.constant(bnb_nf4.STATE, 2, 64),
        }
    )
    expected = np.zeros((2, 64), np.float32)
    expected[0, :3] = [-2.0, 2.0, np.float32(0.33791524171829224) * 2]
    expected[1, 63] = np.float32(0.7229568362236023) / 2
    np.testing.assert_array_equal(weight, expected, strict=True)


def test_the_nf4_book_rises_from_minus_one_over_zero_to_one() -> None:
    book = bnb_nf4.CODE_BOOK
    assert book[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert (np.diff(book) > 0).all()


def test_blocks_of_nf4_run_over_the_ends_of_rows() -> None:
    form = BnbNf4(group_size=64)
    codes = np.full((4, 32), 15, np.uint8)
    weight = form.dequantize(
        {
            "weight": RawTensor("U8", bnb_nf4.pack(codes)),
            "weight.absmax": RawTensor("F32", np.array([3.0, 5.0], np.float32)),
            bnb_nf4.STATE: form.constant(bnb_nf4.STATE, 4, 32),
        }
    )
    assert weight[:, 0].tolist() == [3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("form", "specs"),
    [
        (Plain("BF16"), {"weight": ("BF16", (192, 128))}),
        (Int8Channel(), {"weight": ("I8", (192, 128)), "weight_scale": ("F32", (192, 1))}),
        (
            IntGrouped(bits=4, group_size=64),
            {
                "weight_packed": ("I32", (192, 16)),
                "weight_scale": ("F16", (192, 2)),
                "weight_shape": ("I64", (2,)),
            },
        ),
        (
            IntGrouped(bits=8, group_size=32),
            {
                "weight_packed": ("I32", (192, 32)),
                "weight_scale": ("F16", (192, 4)),
                "weight_shape": ("I64", (2,)),
            },
        ),
        (
            BnbInt8(),
            {"weight": ("I8", (192, 128)), "SCB": ("F32", (192,)), "weight_format": ("U8", ())},
        ),
        (
            BnbNf4(),
            {
                "weight": ("U8", (12288, 1)),
                "weight.absmax": ("F32", (384,)),
                "weight.quant_map": ("F32", (16,)),
                "weight.quant_state.bitsandbytes__nf4": ("U8", (79,)),
            },
        ),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_tensors_are_called_and_shaped_as_their_loaders_expect(
    form: Format, specs: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    assert form.specs(192, 128) == {name: TensorSpec(*spec) for name, spec in specs.items()}


@pytest.mark.parametrize("form", [IntGrouped(), BnbInt8(), BnbNf4()], ids=lambda form: form.name)
def test_constants_are_what_their_specs_say(form: IntGrouped | BnbInt8 | BnbNf4) -> None:
    specs = form.specs(192, 128)
    assert form.constants
    for suffix in form.constants:
        constant = form.constant(suffix, 192, 128)
        assert TensorSpec(constant.dtype, constant.shape) == specs[suffix]


def test_constants_hold_what_their_loaders_read() -> None:
    assert IntGrouped().constant("weight_shape", 192, 128).array.tolist() == [192, 128]
    assert BnbInt8().constant("weight_format", 192, 128).array.tolist() == 0
    assert json.loads(
        BnbNf4(dtype="bfloat16").constant(bnb_nf4.STATE, 192, 128).array.tobytes()
    ) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [192, 128],
    }


def test_plain_formats_have_no_stanza() -> None:
    assert quantization_config(dict.fromkeys(MODULES, Plain("F16"))) is None
    assert read_formats(None, MODULES, "BF16", "config.json") == dict.fromkeys(
        MODULES, Plain("BF16")
    )


@pytest.mark.parametrize("form", QUANTIZED, ids=repr)
def test_one_format_for_all_is_read_from_its_own_stanza(form: Format) -> None:
    formats = dict.fromkeys(MODULES, form)
    assert read_formats(_through_json(formats), MODULES, "F16", "config.json") == formats


@pytest.mark.parametrize("forms", MIXTURES, ids=repr)
def test_a_mixture_is_read_from_its_own_stanza(forms: tuple[Format, ...]) -> None:
    formats = {module: forms[i % len(forms)] for i, module in enumerate(MODULES)}
    dtype = next((form.dtype for form in forms if isinstance(form, Plain)), "F16")
    assert read_formats(_through_json(formats), MODULES, dtype, "config.json") == formats


@given(st.lists(st.integers(0, 3), min_size=len(MODULES), max_size=len(MODULES)))
@UNHURRIED
def test_any_mixture_is_read_from_its_own_stanza(choices: list[int]) -> None:
    forms = (Plain("F16"), Int8Channel(), IntGrouped(bits=4), IntGrouped(bits=8))
    formats = {module: forms[i] for module, i in zip(MODULES, choices, strict=True)}
    assert read_formats(_through_json(formats), MODULES, "F16", "config.json") == formats


def test_targets_match_with_and_without_the_prefix_and_only_their_module() -> None:
    formats = dict.fromkeys(MODULES, IntGrouped()) | {MODULES[3]: Int8Channel()}
    groups = _through_json(formats)["config_groups"]
    (targets,) = [group["targets"] for group in groups.values() if len(group["targets"]) == 1]
    pattern = targets[0].removeprefix("re:")
    assert [module for module in MODULES if re.match(pattern, module)] == [
        "layers.1.self_attn.q_proj"
    ]
    assert re.match(pattern, "model.layers.1.self_attn.q_proj")


def test_the_stanza_says_which_linears_round_their_inputs() -> None:
    rounds = _through_json(dict.fromkeys(MODULES, Int8Channel()))
    keeps = _through_json(dict.fromkeys(MODULES, Int8Channel(rounds_activations=False)))
    assert rounds["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    assert keeps["config_groups"]["group_0"]["input_activations"] is None


def test_bitsandbytes_keeps_no_outliers_apart() -> None:
    for form in (BnbInt8(), BnbNf4()):
        assert _through_json(dict.fromkeys(MODULES, form))["llm_int8_threshold"] == 0.0


@pytest.mark.parametrize(
    ("stanza", "text"),
    [
        ([], "quantization_config must be an object (config.json)"),
        ({}, "quant_method must be bitsandbytes or compressed-tensors, got None (config.json)"),
        (
            {"quant_method": "gptq", "bits": 4},
            "quant_method must be bitsandbytes or compressed-tensors, got 'gptq' (config.json)",
        ),
        (
            {"quant_method": "compressed-tensors"},
            "config_groups must be an object that is not empty (config.json)",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": []},
            "config_groups must be an object that is not empty (config.json)",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "llm_int8_skip_modules must be a list of names, got None (config.json)",
        ),
    ],
)
def test_a_stanza_of_another_kind_is_refused(stanza: Any, text: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("form", "key", "value"),
    [
        (BnbInt8(), "llm_int8_threshold", 6.0),
        (BnbInt8(), "load_in_8bit", False),
        (BnbInt8(), "load_in_8bit", 1),
        (BnbInt8(), "llm_int8_skip_modules", ["lm_head", "layers.0.mlp.gate_proj"]),
        (BnbInt8(), "llm_int8_skip_modules", []),
        (BnbInt8(), "load_in_4bit", True),
        (BnbNf4(), "load_in_4bit", False),
        (BnbNf4(), "bnb_4bit_quant_type", "fp4"),
        (BnbNf4(), "bnb_4bit_use_double_quant", True),
        (BnbNf4(), "bnb_4bit_quant_storage", "bfloat16"),
        (BnbNf4(), "something", None),
        (Int8Channel(), "kv_cache_scheme", {"num_bits": 8}),
        (Int8Channel(), "quantization_status", "frozen"),
        (Int8Channel(), "format", "pack-quantized"),
        (Int8Channel(), "transform_config", {}),
        (IntGrouped(), "sparsity_config", {"format": "dense"}),
        (IntGrouped(), "ignore", ["lm_head"]),
    ],
)
def test_an_option_that_export_does_not_write_is_refused(
    form: Format, key: str, value: Any
) -> None:
    stanza = _through_json(dict.fromkeys(MODULES, form)) | {key: value}
    with pytest.raises(BundleError, match=r"\(config\.json\)$"):
        read_formats(stanza, MODULES, "F16", "config.json")


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        (Int8Channel(), {"symmetric": False}),
        (Int8Channel(), {"num_bits": 4}),
        (Int8Channel(), {"strategy": "tensor"}),
        (Int8Channel(), {"type": "float"}),
        (Int8Channel(), {"dynamic": True}),
        (Int8Channel(), {"symmetric": 1}),
        (IntGrouped(), {"symmetric": False}),
        (IntGrouped(), {"actorder": "weight"}),
        (IntGrouped(), {"num_bits": 4.0}),
        (IntGrouped(), {"group_size": 128.0}),
        (IntGrouped(), {"zp_dtype": "torch.int8"}),
    ],
)
def test_weights_in_another_scheme_are_refused(form: Format, changes: dict[str, Any]) -> None:
    stanza = _through_json(dict.fromkeys(MODULES, form))
    stanza["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(BundleError, match=r"is not one that lowmem writes.*\(config\.json\)$"):
        read_formats(stanza, MODULES, "F16", "config.json")


@pytest.mark.parametrize(
    "group",
    [
        None,
        [],
        {},
        {"targets": ["Linear"]},
        {"targets": "Linear", "weights": {}, "format": "int-quantized"},
        {"targets": [1], "weights": {}, "format": "int-quantized"},
        {"targets": ["Linear"], "weights": None, "format": "pack-quantized"},
        {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "pack-quantized"},
        {"targets": ["Linear"], "weights": {"num_bits": 2}, "format": "pack-quantized"},
        {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 0},
            "format": "pack-quantized",
        },
        {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 12},
            "format": "pack-quantized",
        },
        {"targets": ["Linear"], "weights": {"num_bits": 8}, "format": "float-quantized"},
    ],
)
def test_a_group_of_another_kind_is_refused(group: Any) -> None:
    stanza = _through_json(dict.fromkeys(MODULES, IntGrouped()))
    stanza["config_groups"] = {"group_0": group}
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    text = f"a config group is not one that lowmem writes: {group!r} (config.json)"
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "target",
    [
        "re:.*(a+)+$",
        "re:.*",
        r"re:^layers\.0\.mlp\.down_proj$",
        r"re:.*layers\.0\.mlp\.down_proj",
        r"re:.*layers\.\d+\.mlp\.down_proj$",
    ],
)
def test_a_pattern_other_than_ours_is_refused_before_it_runs(target: str) -> None:
    stanza = _through_json(dict.fromkeys(MODULES, IntGrouped()))
    stanza["config_groups"]["group_0"]["targets"] = [target]
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == (
        f"a target must be a module's name as lowmem writes it, got {target[3:]!r} (config.json)"
    )


def test_a_pattern_that_takes_several_modules_is_refused() -> None:
    stanza = _through_json(dict.fromkeys(MODULES, IntGrouped()))
    stanza["config_groups"]["group_0"]["targets"] = [
        r"re:.*q_proj$",
        r"re:.*o_proj$",
        r"re:.*down_proj$",
    ]
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == "quantization_config is not one that lowmem writes (config.json)"


def test_a_module_in_two_groups_is_refused() -> None:
    formats = dict.fromkeys(MODULES, IntGrouped(bits=4)) | {MODULES[0]: IntGrouped(bits=8)}
    stanza = _through_json(formats)
    for group in stanza["config_groups"].values():
        if len(group["targets"]) == 1:
            group["targets"] *= 2
        else:
            group["targets"].append(r"re:.*layers\.0\.self_attn\.q_proj$")
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == f"{MODULES[0]} is in two config_groups (config.json)"


def test_a_module_in_no_group_is_refused() -> None:
    formats = dict.fromkeys(MODULES, IntGrouped(bits=4)) | {MODULES[0]: IntGrouped(bits=8)}
    stanza = _through_json({name: formats[name] for name in MODULES[:-1]})
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == f"no config group names {MODULES[-1]} (config.json)"


@pytest.mark.parametrize("ignore", [None, 5, "lm_head", [5], [["lm_head"]]])
def test_a_list_of_ignored_modules_that_is_none_is_refused(ignore: Any) -> None:
    compressed = _through_json(dict.fromkeys(MODULES, IntGrouped())) | {"ignore": ignore}
    with pytest.raises(BundleError) as caught:
        read_formats(compressed, MODULES, "F16", "config.json")
    assert str(caught.value) == f"ignore must be a list of names, got {ignore!r} (config.json)"
    bitsandbytes = _through_json(dict.fromkeys(MODULES, BnbNf4()))
    bitsandbytes["llm_int8_skip_modules"] = ignore
    with pytest.raises(BundleError, match="llm_int8_skip_modules must be a list of names, got "):
        read_formats(bitsandbytes, MODULES, "F16", "config.json")


@pytest.mark.parametrize("dtype", [None, "", "float32", "int8888", [], {"a": 1}])
def test_nf4_that_computes_in_another_dtype_is_refused(dtype: Any) -> None:
    stanza = _through_json(dict.fromkeys(MODULES, BnbNf4())) | {"bnb_4bit_compute_dtype": dtype}
    with pytest.raises(BundleError) as caught:
        read_formats(stanza, MODULES, "F16", "config.json")
    assert str(caught.value) == (
        f"bnb_4bit_compute_dtype must be float16 or bfloat16, got {dtype!r} (config.json)"
    )


def _through_json(formats: dict[str, Format]) -> dict[str, Any]:
    stanza: dict[str, Any] = json.loads(json.dumps(quantization_config(formats)))
    return stanza
