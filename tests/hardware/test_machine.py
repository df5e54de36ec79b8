import json
from dataclasses import replace

import pytest

from lowmem.errors import InputError
from lowmem.hardware import (
    Gpu,
    Hardware,
    fingerprint,
)

GIB = 2**30
RTX_3060 = Gpu(
    "NVIDIA GeForce RTX 3060", 12 * GIB, 11900 * 2**20, (8, 6), "555.42.02", "GPU-aaaa1111"
)
MACHINE = Hardware("AMD EPYC 9R14", 8, ("avx2", "avx512f"), 16 * GIB, 12 * GIB, (RTX_3060,))


def test_json_reads_back_as_the_same_hardware() -> None:
    assert Hardware.from_json(json.loads(json.dumps(MACHINE.to_json()))) == MACHINE


def test_a_described_machine_may_leave_out_what_nobody_plans_with() -> None:
    described = {
        "cpu_name": "any",
        "cpu_threads": 4,
        "cpu_features": [],
        "host_total_bytes": GIB,
        "host_free_bytes": GIB,
    }
    card = {"name": "a", "total_bytes": 2, "free_bytes": 1, "compute_capability": [8, 6]}
    assert Hardware.from_json(described).gpus == ()
    assert Hardware.from_json({**described, "gpus": [card]}).gpus == (Gpu("a", 2, 1, (8, 6)),)


def test_the_rates_of_a_described_card_read_back() -> None:
    card = replace(RTX_3060, rates={"fp16": 25.5e12}, memory_bandwidth=360e9, copy_bandwidth=25e9)
    machine = replace(MACHINE, gpus=(card,))
    assert Hardware.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    assert hash(machine) == hash(replace(MACHINE, gpus=(replace(card, rates=None),)))


@pytest.mark.parametrize(
    ("capability", "newest"),
    [
        ((6, 1), {"fp16", "int8"}),
        ((7, 5), {"fp16", "int8"}),
        ((8, 6), {"fp16", "int8", "bf16"}),
        ((8, 9), {"fp16", "int8", "bf16", "fp8"}),
        ((10, 0), {"fp16", "int8", "bf16", "fp8"}),
        ((12, 0), {"fp16", "int8", "bf16", "fp8"}),
    ],
)
def test_arithmetic_of_a_gpu_follows_from_its_generation(
    capability: tuple[int, int], newest: set[str]
) -> None:
    gpu = Gpu("any", 2, 1, capability)
    found = {name for name in ("fp16", "int8", "bf16", "fp8") if gpu.multiplies(name)}
    assert found == newest


def test_more_free_memory_than_there_is_is_refused() -> None:
    with pytest.raises(InputError, match="host_free_bytes must not exceed host_total_bytes"):
        Hardware.from_json({**MACHINE.to_json(), "host_free_bytes": 17 * GIB})


def test_all_problems_of_a_description_are_listed_at_once() -> None:
    described = {**MACHINE.to_json(), "cpu_threads": True, "cores": 4}
    del described["cpu_name"]
    with pytest.raises(InputError) as caught:
        Hardware.from_json(described, "card.json")
    assert str(caught.value) == (
        "card.json: unknown key 'cores'; missing key 'cpu_name'; "
        "cpu_threads must be a whole number, at least 1, got True"
    )


def test_a_gpu_is_named_by_its_place_in_an_error() -> None:
    described = MACHINE.to_json()
    described["gpus"][0]["compute_capability"] = "8.6"
    described["gpus"][0]["vram"] = 1
    with pytest.raises(InputError, match=r"hardware\.gpus\[0\]: unknown key 'vram'; compute_cap"):
        Hardware.from_json(described)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpu_name", 5),
        ("cpu_threads", 0),
        ("cpu_features", ["sse9"]),
        ("cpu_features", "avx2"),
        ("host_total_bytes", 1.5),
        ("host_free_bytes", -1),
        ("gpus", {}),
        ("gpu_problem", 5),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"hardware: {key} must be "):
        Hardware.from_json({**MACHINE.to_json(), key: value})


def test_a_description_must_be_an_object() -> None:
    with pytest.raises(InputError, match="hardware must be a JSON object, got 5"):
        Hardware.from_json(5)


def test_fingerprint_does_not_depend_on_free_memory() -> None:
    described = MACHINE.to_json()
    described["host_free_bytes"] = 5
    described["gpus"][0]["free_bytes"] = 5
    assert fingerprint(Hardware.from_json(described)) == fingerprint(MACHINE)


@pytest.mark.parametrize(
    ("key", "value"), [("cpu_name", "x"), ("cpu_threads", 9), ("cpu_features", []), ("gpus", [])]
)
def test_fingerprint_depends_on_what_decides_speed(key: str, value: object) -> None:
    other = Hardware.from_json({**MACHINE.to_json(), key: value})
    assert fingerprint(other) != fingerprint(MACHINE)


def test_fingerprint_depends_on_the_driver() -> None:
    described = MACHINE.to_json()
    described["gpus"][0]["driver_version"] = "560.1"
    assert fingerprint(Hardware.from_json(described)) != fingerprint(MACHINE)


def test_a_machine_in_words_names_the_card_where_that_computes() -> None:
    cpu = "AMD EPYC 9R14, 8 threads"
    assert MACHINE.words() == cpu
    card = "NVIDIA GeForce RTX 3060"
    assert MACHINE.words("cuda") == f"{card} (driver 555.42.02), {cpu}"
    unknown = replace(MACHINE, gpus=(replace(RTX_3060, driver_version=""),))
    assert unknown.words("cuda") == f"{card} (driver unknown), {cpu}"
    assert replace(MACHINE, gpus=()).words("cuda") == cpu
