from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lowmem import schemas
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import FileEntry, Manifest, Variant, parse_manifest
from lowmem.artifact.verdict import FLOORS
from lowmem.compute.plan import Plan
from lowmem.errors import BundleError, InputError
from lowmem.hardware import Gpu, Hardware

MACHINE = Hardware(
    "AMD EPYC 9R14",
    8,
    ("avx2", "avx512f"),
    16 * 2**30,
    12 * 2**30,
    (Gpu("NVIDIA GeForce RTX 3060", 12 * 2**30, 11 * 2**30, (8, 6), "555.42.02", "GPU-aaaa1111"),),
)
DESCRIBED = replace(
    MACHINE.gpus[0], rates={"fp16": 25.5e12}, memory_bandwidth=360e9, copy_bandwidth=25e9
)
PLAN = Plan("int4", "torch", "cuda", "fp16", "resident", tokens_per_second=812.5)
CONTRACT = Contract(
    query_template="Instruct: {task}\nQuery: {text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=4096,
    normalize_embeddings=True,
    tasks={"search": "Given a question, retrieve passages that answer it"},
    default_task="search",
)
MANIFEST = Manifest(
    {"name": "Linq-AI-Research/Linq-Embed-Mistral", "sha256": "a" * 64, "revision": None},
    "cc-by-nc-4.0",
    CONTRACT,
    {
        "int4": Variant(
            "int4",
            {"method": "data-free", "bits": 4},
            {"linears": 4.25, "model": 4.5},
            {"layers.0.mlp": {"bits": 4.25, "error": 0.01}},
            {"model.onnx": "fp32"},
            {name: FileEntry(10, "b" * 64) for name in ("model.onnx", "1_Pooling/config.json")},
        )
    },
)
REPORT: dict[str, Any] = {
    "format": 1,
    "plan": "int4-torch-cpu-fp32",
    "artifact_sha256": "a" * 64,
    "reference_sha256": "b" * 64,
    "texts": {"name": "quick", "sha256": "c" * 64, "count": 64, "tokens": 3904},
    "cosine": {"mean": 0.98, "median": 0.98, "p5": 0.96, "p1": 0.95, "min": 0.94},
    "buckets": [
        {"kind": "length", "name": "1-16", "count": 64, "mean": 0.98, "p5": 0.96, "min": 0.94}
    ],
    "overlap": {"1": None, "10": 0.8},
    "spearman": None,
    "worst": [{"id": "short-01", "cosine": 0.94}],
    "nonfinite": 0,
    "norm_error": 1e-7,
    "bytes": 4 * 2**30,
    "bits_per_weight": {"linears": 4.25, "model": 4.5},
    "tokens_per_second": 120.5,
    "retrieval": None,
    "sts": None,
    "floor": FLOORS["standard"].to_json(),
    "verdict": "fail",
}


def plan_json() -> dict[str, Any]:
    plans = [PLAN, PLAN.with_(dropped="needs 5.0 GiB on the GPU", tokens_per_second=None)]
    return {
        "format": 1,
        "machine": MACHINE.to_json(),
        "chosen": PLAN.id,
        "reason": "the fastest of 2",
        "warning": None,
        "plans": [plan.to_json() for plan in plans],
    }


def problems(name: str, value: object) -> list[str]:
    return [error.message for error in Draft202012Validator(schemas.load(name)).iter_errors(value)]


def properties(schema: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """All properties that a schema names, with their places."""
    if isinstance(schema, dict):
        for key, value in schema.get("properties", {}).items():
            yield f"{place}/{key}", value
        for key, value in schema.items():
            yield from properties(value, f"{place}/{key}")


@pytest.mark.parametrize("name", schemas.NAMES)
def test_every_schema_is_valid(name: str) -> None:
    schema = schemas.load(name)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", schemas.NAMES)
def test_every_field_is_described(name: str) -> None:
    schema = schemas.load(name)
    undescribed = [
        place
        for place, field in properties(schema)
        if not (field.get("description") or field.get("$ref", "").startswith("#/$defs/"))
    ]
    assert undescribed == []


@pytest.mark.parametrize("name", schemas.NAMES)
def test_every_size_states_its_unit(name: str) -> None:
    for place, field in properties(schemas.load(name)):
        if place.endswith(("bytes", "/size")):
            assert "bytes" in field["description"], place
        if place.endswith("_per_second"):
            assert "per second" in field["description"], place


def test_an_unknown_schema_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"the schemas are manifest, plan, report, bench, got '\.\./x'"
    ):
        schemas.load("../x")


def test_what_plan_prints_is_valid_and_wholly_described() -> None:
    assert problems("plan", plan_json()) == []
    schema = schemas.load("plan")
    described = schema["$defs"]["plan"]["properties"]
    assert set(PLAN.to_json()) == set(described)
    machine = schema["properties"]["machine"]["properties"]
    assert set(MACHINE.to_json()) == set(machine)
    assert set(DESCRIBED.to_json()) == set(machine["gpus"]["items"]["properties"])


def test_a_described_card_and_its_estimates_are_valid() -> None:
    estimated = PLAN.with_(tokens_per_second=None, estimated_tokens_per_second=1200.0)
    value = {
        **plan_json(),
        "machine": replace(MACHINE, gpus=(DESCRIBED,)).to_json(),
        "plans": [estimated.to_json()],
    }
    assert problems("plan", value) == []


@pytest.mark.parametrize(
    "change",
    [
        {"state": "running"},
        {"fidelity": "good"},
        {"tokens_per_second": 0},
        {"estimated_tokens_per_second": 0},
        {"predicted": {}},
    ],
)
def test_a_plan_outside_the_form_is_found(change: dict[str, Any]) -> None:
    value = plan_json()
    value["plans"][0] |= change
    assert problems("plan", value)


def test_a_report_is_valid_with_or_without_figures_that_may_be_missing() -> None:
    full = {**REPORT, "overlap": {"1": 0.9, "10": 0.8}, "spearman": 0.97}
    newer = dict.fromkeys(("search", "invariance", "reference_given"))
    assert problems("report", {"format": 1, "reports": [REPORT, full, {**full, **newer}]}) == []
    assert problems("report", {"format": 1, "reports": [], "agreement": [], "drift": None}) == []


@pytest.mark.parametrize("key", sorted(REPORT))
def test_a_report_lacks_no_key(key: str) -> None:
    lacking = {name: value for name, value in REPORT.items() if name != key}
    assert problems("report", {"format": 1, "reports": [lacking]}) == [
        f"{key!r} is a required property"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"verdict": "good"},
        {"artifact_sha256": "A" * 64},
        {"nonfinite": -1},
        {"cosine": {**REPORT["cosine"], "mean": 1.5}},
        {"cosine": {**REPORT["cosine"], "p5": None}},
        {"overlap": {"1": 0.5}},
        {"worst": ["short-01"]},
        {"retrieval": {}},
        {"sts": {"pairs": 5}},
        {"invariance": {"texts": 6, "alone": -1, "shuffled": 0, "neighbours": 0}},
        {"readiness": {"state": "perhaps"}},
        {"outputs": [{"name": "int8"}]},
    ],
)
def test_a_report_outside_the_form_is_found(change: dict[str, Any]) -> None:
    assert problems("report", {"format": 1, "reports": [{**REPORT, **change}]})


def test_new_keys_may_be_added_to_plan_and_report() -> None:
    report = {**REPORT, "energy_joules": 1.5}
    assert problems("report", {"format": 1, "reports": [report], "note": ""}) == []
    assert problems("plan", {**plan_json(), "note": ""}) == []


def test_what_export_writes_is_valid() -> None:
    assert problems("manifest", MANIFEST.to_json()) == []


def test_the_contract_has_the_same_fields_in_code_and_schema() -> None:
    contract = schemas.load("manifest")["$defs"]["contract"]
    assert set(contract["properties"]) == {field.name for field in fields(Contract)}
    minimal = {key: CONTRACT.to_json()[key] for key in contract["required"]}
    value = {**MANIFEST.to_json(), "contract": minimal}
    assert problems("manifest", value) == []
    assert parse_manifest(value, "lowmem.json").contract == replace(
        CONTRACT, tasks={}, default_task=None
    )


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest with one place, such as ``variants/int4/files``, set to another value."""
    manifest = MANIFEST.to_json()
    *parents, last = path.split("/")
    inner: Any = manifest
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return manifest


ENTRY = {"size": 10, "sha256": "b" * 64}


@pytest.mark.parametrize(
    "value",
    [
        changed("format", 2),
        changed("note", ""),
        changed("licence", 5),
        changed("contract/note", ""),
        changed("contract/pooling", "max"),
        changed("contract/max_seq_length", 3),
        changed("contract/bos_token_id", -1),
        changed("contract/query_template", "no place for it"),
        changed("variants/int4/note", ""),
        changed("variants/int4/files", []),
        changed("variants/reports", MANIFEST.to_json()["variants"]["int4"]),
        changed("variants/..", MANIFEST.to_json()["variants"]["int4"]),
        *(
            changed("variants/int4/files", {path: ENTRY, "model.onnx": ENTRY})
            for path in ("/etc/x", "../x", "a/../x", "a/..", "a//x", "a/", "./x", "", ".", "a\\x")
        ),
        changed("variants/int4/files", {"model.onnx": {"size": 10}}),
        changed("variants/int4/files", {"model.onnx": {**ENTRY, "note": ""}}),
        changed("variants/int4/files", {"model.onnx": {**ENTRY, "size": "10"}}),
    ],
)
def test_schema_and_reader_refuse_the_same_manifests(value: dict[str, Any]) -> None:
    assert problems("manifest", value)
    with pytest.raises(BundleError):
        parse_manifest(value, "lowmem.json")


@pytest.mark.parametrize("path", ["model.safetensors", "1_Pooling/config.json", "a/.b/..c", "..."])
def test_schema_and_reader_take_the_same_paths(path: str) -> None:
    value = changed("variants/int4/files", {path: ENTRY, "model.onnx": ENTRY})
    assert problems("manifest", value) == []
    parse_manifest(value, "lowmem.json")
