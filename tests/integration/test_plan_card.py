"""``lowmem plan --card`` as a user meets it: for a bundle, and for a checkpoint's config alone."""

import json

import jsonschema
import pytest

from lowmem import schemas
from tests.command_line import lowmem

GIB = 2**30


@pytest.fixture
def seven_b(tmp_path):
    """A directory with the ``config.json`` of Mistral 7B and nothing else."""
    config = {
        "model_type": "mistral",
        "architectures": ["MistralModel"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "torch_dtype": "float16",
    }
    folder = tmp_path / "seven_b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("subject", ["tiny_bundle", "seven_b"])
def test_plan_json_of_a_card_follows_its_schema(request, subject):
    subject = request.getfixturevalue(subject)
    plan = json.loads(lowmem("plan", subject, "--card", "rtx 4070", "--json").stdout)
    jsonschema.validate(plan, schemas.load("plan"))
    assert [gpu["name"] for gpu in plan["machine"]["gpus"]] == ["RTX 4070 12GB"]
    assert {one["tokens_per_second"] for one in plan["plans"]} == {None}
    chosen = next(one for one in plan["plans"] if one["id"] == plan["chosen"])
    assert chosen["state"] == "candidate"
    assert chosen["device"] == "cuda"
    assert chosen["estimated_tokens_per_second"] > 0


@pytest.mark.parametrize("subject", ["tiny_bundle", "seven_b"])
def test_the_table_of_a_card_fits_80_columns_and_marks_estimates(request, subject):
    subject = request.getfixturevalue(subject)
    text = lowmem("plan", subject, "--card", "RTX 5090").stdout
    table, _, rest = text.partition("\ndropped\n")
    assert max(map(len, table.splitlines()[1:])) <= 80  # the first line is this machine's CPU
    assert max(map(len, rest.partition("chosen: ")[2].splitlines())) <= 80
    assert "RTX 5090 32GB, 31.50 GiB of 32.00 GiB free (described)" in table
    assert "~ is an estimate from the card's rates: nothing was measured" in table
    rows = [line for line in table.splitlines() if " cuda " in line and " torch " in line]
    assert rows
    assert all("~" in row for row in rows)
    assert not any("~" in line for line in table.splitlines() if " cpu " in line)


def test_a_bundle_is_not_timed_for_a_card(tiny_bundle):
    printed = lowmem("plan", tiny_bundle, "--card", "T4")
    assert "nothing was timed: the machine is described" in printed.stdout
    assert "timing" not in printed.stderr


def test_a_described_machine_decides_what_fits(seven_b, tmp_path):
    file = tmp_path / "machine.json"
    card = {
        "name": "my card",
        "total_bytes": 20 * GIB,
        "compute_capability": [8, 9],
        "rates": {"fp32": 20e12, "fp16": 40e12, "bf16": 40e12},
        "memory_bandwidth": 400e9,
        "copy_bandwidth": 12e9,
    }
    file.write_text(json.dumps({"host_total_bytes": 64 * GIB, "gpus": [card]}))
    plan = json.loads(lowmem("plan", seven_b, "--card", file, "--json").stdout)
    assert plan["chosen"] == "fp16-torch-cuda-bf16-resident"
    assert plan["machine"]["host_total_bytes"] == 64 * GIB
    card["total_bytes"] = 8 * GIB
    file.write_text(json.dumps({"gpus": [card]}))
    plan = json.loads(lowmem("plan", seven_b, "--card", file, "--json").stdout)
    assert plan["chosen"] == "fp16-torch-cuda-bf16-streamed"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("RTX 3060 Tii", "a card must be a known name or a JSON file that describes one"),
        ("RTX 4060 Ti", "RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"),
        ("missing.json", "got 'missing.json'"),
    ],
)
def test_a_card_that_is_none_is_one_line(seven_b, card, message):
    printed = lowmem("plan", seven_b, "--card", card, status=1)
    assert message in printed.stderr
    assert printed.stderr.count("\n") == 1
    assert printed.stderr.startswith("lowmem: error: ")
    assert printed.stdout == ""
