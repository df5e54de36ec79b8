"""The machine as a value: what plans are made for, whether it was probed or described."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem.errors import InputError

_X86_FEATURES = (
    "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16 amx_fp16"
)
_AARCH64_FEATURES = "asimddp i8mm bf16 asimdhp"
CPU_FEATURES = frozenset(f"{_X86_FEATURES} {_AARCH64_FEATURES}".split())
"""The instruction sets that decide a plan, as Linux names them."""

ARITHMETICS: Mapping[str, tuple[int, int]] = {
    "fp32": (0, 0),
    "fp16": (5, 3),
    "fp16-acc16": (5, 3),
    "int8": (6, 1),
    "bf16": (8, 0),
    "fp8": (8, 9),
}
"""Products that a GPU may do in hardware, each with the compute capability that brought it."""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; ``compute_capability`` is (major, minor).

    The last three are stated of a described device, so that speed can be estimated, and None of a
    probed one, where it is measured: ``rates`` in operations per second by the names in
    ``ARITHMETICS`` (a multiplication and an addition are two), the bandwidths of its memory and of
    copies from the host in bytes per second.
    """

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    driver_version: str = ""
    uuid: str = ""
    rates: Mapping[str, float] | None = field(default=None, hash=False)
    memory_bandwidth: float | None = None
    copy_bandwidth: float | None = None

    def multiplies(self, arithmetic: str) -> bool:
        """Whether the device has products of a name in ``ARITHMETICS``."""
        return self.compute_capability >= ARITHMETICS[arithmetic]

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object that :meth:`from_json` reads."""
        return {**dataclasses.asdict(self), "compute_capability": list(self.compute_capability)}

    @classmethod
    def from_json(cls, value: object, place: str = "gpu") -> Gpu:
        """Reads a described GPU; all but the first four fields may be left out.

        Args:
            value: A decoded JSON value.
            place: What the value is called in errors.

        Raises:
            InputError: A key is unknown, missing, or of another type; more is free than there is,
                or there is a rate of an arithmetic that the compute capability lacks.
        """
        fields = _checked(value, cls, _GPU_RULES, place)
        gpu = cls(**{**fields, "compute_capability": tuple(fields["compute_capability"])})
        lacking = [name for name in gpu.rates or () if not gpu.multiplies(name)]
        if lacking:
            major, minor = gpu.compute_capability
            raise InputError(
                f"{place}: rates must be of what compute capability {major}.{minor} multiplies, "
                f"got {', '.join(lacking)}"
            )
        return gpu


@dataclass(frozen=True)
class Hardware:
    """What a plan may run on.

    ``cpu_threads`` is how many threads can run at once, ``host_*_bytes`` are main memory, both
    within the limits on this process. ``gpus`` are the visible ones in CUDA_VISIBLE_DEVICES'
    order, else by PCI bus as nvidia-smi lists them; CUDA itself puts the fastest first unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID, so among unlike cards go by ``uuid``. ``gpu_problem`` says why
    there is no GPU, or why one is left out.
    """

    cpu_name: str
    cpu_threads: int
    cpu_features: tuple[str, ...]
    host_total_bytes: int
    host_free_bytes: int
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None

    @property
    def why_no_gpu(self) -> str:
        """What an error says where a card was asked for and there is none."""
        return f"there is no CUDA device: {self.gpu_problem or 'none is visible'}"

    def words(self, device: str = "cpu") -> str:
        """What a plan on a device runs on, for people: its card and driver, if any, first."""
        gpu = self.gpus[0] if device == "cuda" and self.gpus else None
        card = "" if gpu is None else f"{gpu.name} (driver {gpu.driver_version or 'unknown'}), "
        return f"{card}{self.cpu_name}, {self.cpu_threads} threads"

    @property
    def has_native_bf16(self) -> bool:
        """Multiplies bf16 in hardware; elsewhere bf16 is widened first, and fp32 is faster."""
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(self.cpu_features)

    @property
    def has_native_fp16(self) -> bool:
        """Multiplies fp16 in hardware; converting alone (F16C) leaves it many times slower."""
        return not {"avx512_fp16", "amx_fp16", "asimdhp"}.isdisjoint(self.cpu_features)

    @property
    def has_vnni(self) -> bool:
        """Sums four 8-bit products straight into 32 bits.

        Without it, x86 kernels for u8×s8 add pairs of products in 16 bits, which saturates: fast
        and wrong; those for u8×u8 are exact. aarch64's dot product (``asimddp``, ``i8mm``) is
        exact like VNNI.
        """
        exact = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
        return not exact.isdisjoint(self.cpu_features)

    @property
    def has_amx(self) -> bool:
        """Multiplies 16-bit matrices in tiles, whose rows are of an order of their own."""
        return not {"amx_bf16", "amx_fp16"}.isdisjoint(self.cpu_features)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object that :meth:`from_json` reads."""
        return {
            **dataclasses.asdict(self),
            "cpu_features": list(self.cpu_features),
            "gpus": [gpu.to_json() for gpu in self.gpus],
        }

    @classmethod
    def from_json(cls, value: object, place: str = "hardware") -> Hardware:
        """Reads a described machine; ``gpus`` and ``gpu_problem`` may be left out.

        Args:
            value: A decoded JSON value.
            place: What the value is called in errors.

        Raises:
            InputError: A key is unknown, missing, or of another type, or more is free than there
                is.
        """
        fields = _checked(value, cls, _HARDWARE_RULES, place)
        fields["cpu_features"] = tuple(fields["cpu_features"])
        fields["gpus"] = tuple(
            Gpu.from_json(gpu, f"{place}.gpus[{index}]")
            for index, gpu in enumerate(fields.get("gpus", ()))
        )
        return cls(**fields)


def fingerprint(hardware: Hardware) -> str:
    """Returns 16 hex digits that change with whatever decides speed, and not with free memory."""
    parts = (
        hardware.cpu_name,
        hardware.cpu_threads,
        hardware.cpu_features,
        [(gpu.name, gpu.driver_version) for gpu in hardware.gpus],
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_Rule = tuple[str, Callable[[Any], bool]]

# `type(v) is int` and not isinstance: true is not a number of bytes.
_STRING: _Rule = ("a string", lambda v: type(v) is str)
_BYTES: _Rule = ("a whole number of bytes", lambda v: type(v) is int and v >= 0)
_CAPABILITY: _Rule = (
    "a list [major, minor]",
    lambda v: type(v) is list and [type(part) for part in v] == [int, int] and min(v) >= 0,
)
_FEATURES: _Rule = (
    f"a list out of {sorted(CPU_FEATURES)}",
    lambda v: type(v) is list and all(type(part) is str and part in CPU_FEATURES for part in v),
)

_RATES: _Rule = (
    f"null or an object of {', '.join(ARITHMETICS)} in operations per second, 1e8 to 1e18",
    lambda v: (
        v is None
        or (type(v) is dict and v.keys() <= ARITHMETICS.keys() and all(map(_is_rate, v.values())))
    ),
)
_BANDWIDTH: _Rule = (
    "null or bytes per second, 1e8 to 1e18",
    lambda v: v is None or _is_rate(v),
)

_GPU_RULES: Mapping[str, _Rule] = {
    "name": _STRING,
    "total_bytes": _BYTES,
    "free_bytes": _BYTES,
    "compute_capability": _CAPABILITY,
    "driver_version": _STRING,
    "uuid": _STRING,
    "rates": _RATES,
    "memory_bandwidth": _BANDWIDTH,
    "copy_bandwidth": _BANDWIDTH,
}
_HARDWARE_RULES: Mapping[str, _Rule] = {
    "cpu_name": _STRING,
    "cpu_threads": ("a whole number, at least 1", lambda v: type(v) is int and v >= 1),
    "cpu_features": _FEATURES,
    "host_total_bytes": _BYTES,
    "host_free_bytes": _BYTES,
    "gpus": ("a list", lambda v: type(v) is list),
    "gpu_problem": ("a string or null", lambda v: v is None or type(v) is str),
}


def _checked(
    value: object, kind: type[Gpu] | type[Hardware], rules: Mapping[str, _Rule], place: str
) -> dict[str, Any]:
    """Returns a copy of ``value`` whose keys and values are fit for the constructor of ``kind``."""
    if not isinstance(value, dict):
        raise InputError(f"{place} must be a JSON object, got {value!r}")
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    problems = [f"unknown key {key!r}" for key in value if key not in rules]
    problems += [f"missing key {key!r}" for key in needed if key not in value]
    problems += [
        f"{key} must be {rule}, got {value[key]!r}"
        for key, (rule, holds) in rules.items()
        if key in value and not holds(value[key])
    ]
    free, total = (next(k for k in rules if k.endswith(f"{w}_bytes")) for w in ("free", "total"))
    if not problems and value[free] > value[total]:
        problems = [f"{free} must not exceed {total}, got {value[free]} and {value[total]}"]
    if problems:
        raise InputError(f"{place}: {'; '.join(problems)}")
    return dict(value)


def _is_rate(value: Any) -> bool:
    """Whether a number can be a rate per second; one in units of 10^12 or 10^9 cannot."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 1e8 <= value <= 1e18
