"""``quantization_config`` of ``config.json``: formats to stanza, and stanza to formats.

Only what export writes is read. A group, scheme or option that is not among these is refused:
another loader may know it, but our dequantization of it would be a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lowmem.artifact import strict_json
from lowmem.artifact.formats.bnb_int8 import BnbInt8
from lowmem.artifact.formats.bnb_nf4 import BnbNf4
from lowmem.artifact.formats.int8_channel import Int8Channel
from lowmem.artifact.formats.int_grouped import IntGrouped
from lowmem.artifact.formats.plain import Plain
from lowmem.errors import BundleError

if TYPE_CHECKING:
    from lowmem.artifact.formats import Format


def quantization_config(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The stanza for a map of modules to formats, or None when all are plain.

    Args:
        formats: Module names, ``layers.0.self_attn.q_proj`` and so on (no ``model.``), to formats.
    """
    kinds = {type(form) for form in formats.values()} - {Plain}
    plain = sorted(module for module, form in formats.items() if isinstance(form, Plain))
    if not kinds:
        return None
    if kinds == {BnbInt8}:
        return _bitsandbytes(plain, None)
    if kinds == {BnbNf4}:
        return _bitsandbytes(plain, next(f for f in formats.values() if isinstance(f, BnbNf4)))
    assert kinds <= {Int8Channel, IntGrouped}, kinds
    return _compressed_tensors(formats, plain)


def read_formats(stanza: Any, modules: Iterable[str], dtype: str, place: str) -> dict[str, Format]:
    """The format of every linear, from a variant's stanza.

    Args:
        stanza: The object under ``quantization_config``, or None.
        modules: Names of the linears, without ``model.``.
        dtype: Dtype of unquantized weights, F16, BF16 or F32.
        place: The file's name, for messages.

    Raises:
        BundleError: The stanza names a method, scheme or option that export does not write, or
            leaves it open which format a module has.
    """
    if stanza is None:
        return {module: Plain(dtype) for module in modules}
    if not isinstance(stanza, dict):
        raise BundleError(f"quantization_config must be an object ({place})")
    method = stanza.get("quant_method")
    if method == "bitsandbytes":
        return _read_bitsandbytes(stanza, modules, dtype, place)
    if method == "compressed-tensors":
        return _read_compressed_tensors(stanza, modules, dtype, place)
    raise BundleError(
        f"quant_method must be bitsandbytes or compressed-tensors, got {method!r} ({place})"
    )


def _bitsandbytes(plain: list[str], nf4: BnbNf4 | None) -> dict[str, Any]:
    stanza: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": nf4 is None,
        "load_in_4bit": nf4 is not None,
        # 6.0, the default, turns on a decomposition that is slower than no quantization at all.
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": ["lm_head", *plain],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    if nf4 is not None:
        stanza |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": nf4.dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
    return stanza


def _read_bitsandbytes(
    stanza: dict[str, Any], modules: Iterable[str], dtype: str, place: str
) -> dict[str, Format]:
    form: Format = BnbInt8()
    if stanza.get("load_in_4bit") is True:
        compute_dtype = stanza.get("bnb_4bit_compute_dtype")
        if compute_dtype not in ("float16", "bfloat16"):
            raise BundleError(
                "bnb_4bit_compute_dtype must be float16 or bfloat16, "
                f"got {compute_dtype!r:.200} ({place})"
            )
        form = BnbNf4(dtype=compute_dtype)
    skipped = _names(stanza, "llm_int8_skip_modules", place)
    formats: dict[str, Format] = {
        module: Plain(dtype) if module in skipped else form for module in modules
    }
    _require_ours(stanza, formats, place)
    return formats


def _compressed_tensors(formats: Mapping[str, Format], plain: list[str]) -> dict[str, Any]:
    distinct = sorted({form for form in formats.values() if not isinstance(form, Plain)}, key=repr)
    groups = {}
    for number, form in enumerate(distinct):
        members = [module for module, other in formats.items() if other == form]
        targets = ["Linear"] if len(distinct) == 1 else [_pattern(module) for module in members]
        groups[f"group_{number}"] = _group(form, targets)
    names = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [_pattern(module) for module in plain],
        "config_groups": groups,
    }


def _group(form: Format, targets: list[str]) -> dict[str, Any]:
    assert isinstance(form, Int8Channel | IntGrouped)
    weights: dict[str, Any] = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    inputs = None
    if isinstance(form, IntGrouped):
        weights |= {"strategy": "group", "group_size": form.group_size}
        layout = "pack-quantized"
    else:
        weights |= {"strategy": "channel", "group_size": None}
        layout = "int-quantized"
        if form.rounds_activations:
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "dynamic": True,
                "strategy": "token",
            }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }


def _pattern(module: str) -> str:
    """A target that matches the module with and without ``model.`` before it."""
    return "re:.*" + module.replace(".", r"\.") + "$"


def _read_compressed_tensors(
    stanza: dict[str, Any], modules: Iterable[str], dtype: str, place: str
) -> dict[str, Format]:
    names = list(modules)
    formats: dict[str, Format] = {}
    groups = stanza.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BundleError(f"config_groups must be an object that is not empty ({place})")
    for group in groups.values():
        form = _read_group(group, place)
        for module in names:
            if any(_matches(target, module, place) for target in group["targets"]):
                if formats.setdefault(module, form) != form:
                    raise BundleError(f"{module} is in two config_groups ({place})")
    ignored = _names(stanza, "ignore", place)
    for module in names:
        if any(_matches(target, module, place) for target in ignored):
            formats[module] = Plain(dtype)
    missing = [module for module in names if module not in formats]
    if missing:
        raise BundleError(f"no config group names {missing[0]} ({place})")
    _require_ours(stanza, formats, place)
    return formats


def _read_group(group: Any, place: str) -> Format:
    try:
        weights, targets = group["weights"], group["targets"]
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise TypeError
        if group["format"] == "int-quantized":
            return Int8Channel(rounds_activations=group["input_activations"] is not None)
        if group["format"] == "pack-quantized":
            bits, size = weights["num_bits"], weights["group_size"]
            if type(bits) is int and bits in (4, 8) and type(size) is int:
                if size >= 8 and size % 8 == 0:
                    return IntGrouped(bits, size)
    except (KeyError, TypeError):
        pass
    raise BundleError(f"a config group is not one that lowmem writes: {group!r:.200} ({place})")


def _names(stanza: Mapping[str, Any], key: str, place: str) -> list[str]:
    value = stanza.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BundleError(f"{key} must be a list of names, got {value!r:.200} ({place})")
    return value


def _require_ours(stanza: Mapping[str, Any], formats: Mapping[str, Format], place: str) -> None:
    """Compares as JSON, in which 1, 1.0 and true are three values, as they are to other readers."""
    if strict_json.canonical(quantization_config(formats)) != strict_json.canonical(stanza):
        raise BundleError(f"quantization_config is not one that lowmem writes ({place})")


def _matches(target: str, module: str, place: str) -> bool:
    if target == "Linear":
        return True
    return target.startswith("re:") and re.match(_safe(target[3:], place), module) is not None


def _safe(pattern: str, place: str) -> str:
    """Refuses patterns other than our own, so that a hostile one cannot run for ever."""
    if not re.fullmatch(r"\.\*([A-Za-z0-9_]|\\\.)+\$", pattern):
        raise BundleError(
            f"a target must be a module's name as lowmem writes it, got {pattern!r:.200} ({place})"
        )
    return pattern
