"""Configs by vLLM's rules for compressed-tensors, which does not install on every machine.

As its ``compressed_tensors.py`` and ``utils.py`` read them: linears are fused into ``qkv_proj`` and
``gate_up_proj``, a fused one matches if all its parts do, and takes the scheme of its first part.
"""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import Format, Plain, quantization_config
from lowmem.artifact.variants import HIGH, LOW, formats_for
from tests.shapes import SEVEN_B

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
CLASS = "RowParallelLinear"  # of any of its linears: "Linear" is looked for inside the name


def mixed(config: ModelConfig) -> dict[str, Format]:
    """Some stages of every kind in 8 bits, as a budget leaves them."""
    formats: dict[str, Format] = formats_for("int4", config, "F16")
    for index, stage in enumerate(FUSED.values()):
        formats |= {f"layers.{7 * index + 1}.{name}": HIGH for name in stage}
    return formats


def with_plain_stages(config: ModelConfig) -> dict[str, Format]:
    plain: Format = Plain("F16")
    stage = FUSED["mlp.gate_up_proj"]
    return formats_for("int4", config, "F16") | {f"layers.11.{name}": plain for name in stage}


VARIANTS = {
    "int4": formats_for("int4", SEVEN_B, "F16"),
    "int8": formats_for("int8", SEVEN_B, "F16"),
    "mixed": mixed(SEVEN_B),
    "ignored": with_plain_stages(SEVEN_B),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_every_fused_linear_gets_the_scheme_of_all_its_parts(name: str, prefix: str) -> None:
    formats = VARIANTS[name]
    config = quantization_config(formats)
    assert config is not None
    for index in range(SEVEN_B.num_hidden_layers):
        for fused, parts in FUSED.items():
            expected = {formats[f"layers.{index}.{part}"] for part in parts}
            assert len(expected) == 1
            assert scheme(config, f"{prefix}layers.{index}.{fused}") == named(expected.pop())


def named(form: Format) -> str:
    if isinstance(form, Plain):
        return "unquantized"
    return {LOW: "W4A16 32", HIGH: "W8A16 64"}.get(form, "W8A8")  # type: ignore[call-overload, no-any-return]


def scheme(config: Mapping[str, Any], layer: str) -> str:
    """The scheme that vLLM takes for one of its linears.

    Raises:
        AssertionError: It refuses the config.
    """
    fused = next(name for name in FUSED if layer.endswith(name))
    parts = [layer.replace(fused, part) for part in FUSED[fused]]
    ignored = {any(matches(part, target) for target in config["ignore"]) for part in parts}
    assert len(ignored) == 1, f"parts of {layer} are ignored in part"
    if ignored.pop():
        return "unquantized"
    groups = {
        target: group for group in config["config_groups"].values() for target in group["targets"]
    }
    target = next((one for one in groups if matches(layer, one)), None)
    target = target or next((one for one in groups if one.lower() in CLASS.lower()), None)
    if target is None:
        found = [next((one for one in groups if matches(part, one)), None) for part in parts]
        assert all(found), f"no group for {layer}"
        target = found[0]
    group = groups[target]
    weights, inputs = group["weights"], group["input_activations"]
    assert weights["symmetric"]
    assert not weights["dynamic"]
    assert weights["strategy"] in ("channel", "group")
    if inputs is None:
        assert config["format"] == "pack-quantized"
        assert weights["num_bits"] in (4, 8)
        return f"W{weights['num_bits']}A16 {weights['group_size']}"
    assert config["format"] == "int-quantized"
    assert weights["num_bits"] == inputs["num_bits"] == 8
    assert weights["strategy"] == "channel"
    assert inputs["strategy"] == "token"
    assert inputs["dynamic"]
    return "W8A8"


def matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target
