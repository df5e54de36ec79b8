import json
from importlib import resources

import pytest

from lowmem.errors import BundleError, InputError
from lowmem.hardware import Gpu, Hardware
from lowmem.hardware.machine import ARITHMETICS
from lowmem.planner.cards import DEVICE_RESERVE_BYTES, HOST_RESERVE_BYTES, cards, describe, find

GIB = 2**30
HERE = Hardware("CPU", 8, ("avx2",), 32 * GIB, 20 * GIB, gpu_problem="no driver")
CARD = {"name": "mine", "total_bytes": 8 * GIB, "compute_capability": [8, 9]}


@pytest.fixture
def described(tmp_path):
    """Describes the machine of a JSON value, or of text."""

    def write(value):
        path = tmp_path / "card.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return describe(str(path), HERE)

    return write


def test_every_card_names_its_source():
    table = json.loads(resources.files("lowmem.data").joinpath("cards.json").read_text())
    assert {card["source"] for card in table["cards"]} <= table["sources"].keys()


def test_the_table_spans_turing_to_blackwell_and_4_to_24_gb():
    assert {card.compute_capability for card in cards()} == {(7, 5), (8, 6), (8, 9), (12, 0)}
    sizes = {int(card.name.split()[-1].removesuffix("GB")) for card in cards()}
    assert sizes >= {4, 6, 8, 12, 16, 24}
    assert len({card.name for card in cards()}) == len(cards())


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_a_card_of_the_table_is_plausible(card):
    natural = {name for name in ARITHMETICS if card.multiplies(name)}
    assert natural - set(card.rates) <= ({"fp16-acc16"} if "GTX" in card.name else set())
    assert card.rates["fp32"] < card.rates["fp16"] < card.rates["int8"]
    assert card.rates.get("bf16", card.rates["fp16"]) == card.rates["fp16"]
    assert 1e12 < card.rates["fp32"] < 2e14
    assert 1e10 <= card.copy_bandwidth < card.memory_bandwidth < 2e12
    named = int(card.name.split()[-1].removesuffix("GB")) * GIB
    assert 0.93 * named <= card.total_bytes <= named  # error correction takes a sixteenth
    assert card.free_bytes == card.total_bytes - DEVICE_RESERVE_BYTES


@pytest.mark.parametrize(
    ("name", "fp16", "int8", "bandwidth"),
    [
        ("RTX 2080 Ti", 53.8, 215, 616),
        ("RTX 3060", 25.5, 102, 360),
        ("RTX 3090", 71, 284, 936),
        ("RTX 4060", 30.2, 121, 272),
        ("RTX 4090", 165.2, 660.6, 1008),
        ("RTX 5060 Ti 16GB", 47.4, 190, 448),
        ("RTX 5090", 209.5, 838, 1792),
        ("T4", 65, 130, 320),
    ],
)
def test_rates_are_the_specified_ones(name, fp16, int8, bandwidth):
    card = find(name)
    assert card.rates["fp16"] == pytest.approx(fp16 * 1e12, rel=0.01)
    assert card.rates["int8"] == pytest.approx(int8 * 1e12, rel=0.01)
    assert card.memory_bandwidth == bandwidth * 1e9


@pytest.mark.parametrize(
    "name",
    ["RTX 3060 12GB", "rtx3060", "NVIDIA GeForce RTX 3060 12 GiB", "geforce-rtx_3060 12g"],
)
def test_spelling_does_not_count(name):
    assert find(name).name == "RTX 3060 12GB"


def test_a_longer_name_is_another_card():
    assert find("RTX 4070").name == "RTX 4070 12GB"
    assert find("RTX 4070 Ti").name == "RTX 4070 Ti 12GB"
    assert find("Tesla T4").name == "T4 16GB"


def test_a_name_that_several_cards_have_is_refused_with_them():
    with pytest.raises(InputError) as caught:
        find("RTX 5060 Ti")
    assert str(caught.value) == (
        "a card must be named with its memory where there are several, got 'RTX 5060 Ti': "
        "RTX 5060 Ti 8GB, RTX 5060 Ti 16GB"
    )


@pytest.mark.parametrize("name", ["RTX 3060 Tii", "RTX 3060 6GB", "3060", "", "x" * 10_000, "é\n"])
def test_an_unknown_name_is_refused_with_near_ones(name):
    with pytest.raises(InputError, match=r"known name or a JSON file .* near are .*GB") as caught:
        describe(name, HERE)
    assert len(str(caught.value)) < 300
    if "3060" in name:
        assert "RTX 3060" in str(caught.value).partition("near are")[2]


def test_a_name_stands_for_the_card_in_this_machine():
    machine = describe("RTX 3060", HERE)
    assert machine.gpus == (find("RTX 3060 12GB"),)
    assert (machine.cpu_name, machine.host_free_bytes) == ("CPU", 20 * GIB)
    assert machine.gpu_problem is None


def test_a_file_may_leave_out_host_and_free_memory(described):
    machine = described({"gpus": [CARD, "RTX 4090"]})
    assert machine.gpus == (
        Gpu("mine", 8 * GIB, 8 * GIB - DEVICE_RESERVE_BYTES, (8, 9)),
        find("RTX 4090"),
    )
    assert machine.host_free_bytes == HERE.host_free_bytes
    assert described({}).gpus == ()


def test_a_file_may_describe_another_host(described):
    machine = described({"host_total_bytes": 16 * GIB, "gpus": ["T4"]})
    assert machine.host_free_bytes == 16 * GIB - HOST_RESERVE_BYTES
    assert described({"host_total_bytes": GIB}).host_free_bytes == 0
    cpu = {"cpu_name": "other", "cpu_threads": 4, "cpu_features": []}
    assert described(cpu).cpu_name == "other"


def test_what_a_plan_prints_of_its_machine_is_a_description(described):
    machine = describe("RTX 5070", HERE)
    assert described(machine.to_json()) == machine


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"cpu_name": "other"}, "missing key 'cpu_threads'; missing key 'cpu_features'"),
        ({"host_free_bytes": GIB}, "missing key 'host_total_bytes'"),
        ({"host_total_bytes": GIB, "host_free_bytes": 2 * GIB}, "host_free_bytes must not exceed"),
        ({"host_total_bytes": "16 GB"}, "host_total_bytes must be a whole number of bytes"),
        ({"vram": 8}, "unknown key 'vram'"),
        ({"gpus": "T4"}, "gpus must be a list, got 'T4'"),
        ({"gpus": ["RTX 1"]}, "a card must be a known name"),
        ({"gpus": [8]}, r"gpus\[0\] must be a JSON object, got 8"),
        ({"gpus": ["T4", {**CARD, "vram": 8}]}, r"card\.json\.gpus\[1\]: unknown key 'vram'"),
        ({"gpus": [{**CARD, "total_bytes": True}]}, "total_bytes must be a whole number of bytes"),
        ({"gpus": [{**CARD, "free_bytes": 9 * GIB}]}, "free_bytes must not exceed total_bytes"),
        ({"gpus": [{**CARD, "compute_capability": [-1, 0]}]}, "compute_capability must be a list"),
        ({"gpus": [{**CARD, "rates": {"fp64": 1e12}}]}, "rates must be null or an object of fp32"),
        ({"gpus": [{**CARD, "rates": {"fp16": 25.5}}]}, "in operations per second, 1e8 to 1e18"),
        ({"gpus": [{**CARD, "rates": {"fp16": True}}]}, "in operations per second"),
        ({"gpus": [{**CARD, "memory_bandwidth": 360}]}, "memory_bandwidth must be null or bytes"),
        ({"gpus": [{**CARD, "copy_bandwidth": -1e9}]}, "copy_bandwidth must be null or bytes"),
        (
            {"gpus": [{**CARD, "compute_capability": [7, 5], "rates": {"bf16": 1e13}}]},
            r"gpus\[0\]: rates must be of what compute capability 7\.5 multiplies, got bf16",
        ),
    ],
)
def test_a_description_that_is_none_is_refused(described, value, problem):
    with pytest.raises(InputError, match=problem):
        described(value)


@pytest.mark.parametrize("text", ["", "[]", '{"gpus": [], "gpus": []}', '{"gpus": NaN}', "{" * 99])
def test_a_file_that_is_not_a_json_object_is_refused(described, text):
    with pytest.raises(BundleError, match=r"card\.json"):
        described(text)
