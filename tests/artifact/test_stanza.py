import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.artifact.formats import (
    BnbInt8,
    BnbNf4,
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    quantization_config,
    read_formats,
)
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
