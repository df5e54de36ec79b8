"""The command line as a user meets it, on a tiny bundle."""

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import jsonschema
import numpy as np
import pytest

from lowmem import InputError, schemas
from lowmem.artifact.models import known_models
from lowmem.cli.export import _contract
from tests.command_line import lowmem
from tests.models import CONTRACT, TEXTS

FP32 = ("--engine", "torch", "--compute", "fp32")
SOURCE = ("BUNDLE/fp16", "--contract", "linq")


def test_a_contract_may_be_named_and_check_knows_the_model(cli_bundle, tmp_path):
    checkpoint = cli_bundle.parent / "checkpoint"
    named = tmp_path / "named"
    options = ("--variants", "fp16", "--no-onnx", "--reference-texts", "none")
    lowmem("export", checkpoint, named, "--contract", "e5-mistral", *options)
    manifest = json.loads((named / "lowmem.json").read_text())
    jsonschema.validate(manifest, schemas.load("manifest"))
    assert manifest["source"]["model"] == "e5-mistral"
    assert manifest["contract"]["query_template"] == "Instruct: {task}\nQuery: {text}"
    done = lowmem("check", named)
    assert "the card of e5-mistral prints no scores, nothing is compared" in done.stdout


def test_a_contract_that_was_found_is_taken_unless_another_is_asked_for(tmp_path):
    linq, gritlm = known_models()["linq"].contract, known_models()["gritlm"].contract
    assert _contract(None, ("linq",), "x") == (linq, "linq")
    assert _contract("gritlm", ("linq",), "x") == (gritlm, "gritlm")
    file = tmp_path / "contract.json"
    file.write_text(json.dumps(CONTRACT.to_json()))
    assert _contract(str(file), ("linq",), "x") == (CONTRACT, "linq")
    assert _contract(str(file), ("linq", "sfr"), "x") == (CONTRACT, None)


def test_a_contract_that_files_cannot_tell_is_asked_for_with_the_candidates():
    with pytest.raises(InputError) as caught:
        _contract(None, ("linq", "sfr"), "checkpoint")
    assert str(caught.value) == (
        "the input contract of checkpoint must be given, its files fit linq, sfr alike: give "
        "--contract NAME (of linq, sfr), or --contract FILE, a JSON object with templates, special "
        "tokens, attention, pooling and length limit (README, 'The input contract')"
    )
    with pytest.raises(InputError, match="and '' is neither"):
        _contract("", (), "checkpoint")


def test_check_ends_with_status_1_and_one_line_where_scores_differ(cli_bundle, tmp_path):
    answers = {
        "source": "https://example.org/card",
        "task": "same",
        "queries": ["the quick fox"],
        "documents": ["the brown fox", "at the end"],
        "scores": [[99.5, -99.5]],
        "arithmetic": "fp32",
    }
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    options = ("--answers", tmp_path / "answers.json", "--variant", "int8", *FP32)
    done = lowmem("check", cli_bundle, *options, status=1)
    assert "100 x cosine: https://example.org/card" in done.stdout
    assert "quantized: 0.2, and what a mean cosine of 0.985, the floor standard" in done.stdout
    assert [line.split()[:3] for line in done.stdout.splitlines()[-2:]] == [
        ["1", "1", "99.500"],
        ["1", "2", "-99.500"],
    ]
    assert "plan int8-torch-cpu-fp32-resident" in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("lowmem: error: ")]
    assert "int8-torch-cpu-fp32-resident does not give the scores of answers.json" in line
    assert "must score -99.500 within" in line


def test_export_prints_bits_and_sizes(cli_bundle):
    again = lowmem(
        "export",
        cli_bundle.parent / "checkpoint",
        cli_bundle,
        "--contract",
        cli_bundle.parent / "contract.json",
        *("--reference-texts", "quick", "--calibration", "none"),
    )
    assert "int4" in again.stdout
    assert "4.500 bits/weight" in again.stdout


def test_a_budget_of_bits_is_a_variant_of_its_own(cli_bundle, tmp_path):
    contract = ("--contract", cli_bundle.parent / "contract.json", "--reference-texts", "none")
    (tmp_path / "texts.txt").write_text("one text\nand another\n" * 20)
    options = ("--variants", "int4", "--bits", "6", "--calibration", tmp_path / "texts.txt")
    done = lowmem("export", cli_bundle.parent / "checkpoint", tmp_path / "new", *contract, *options)
    name, bits, *_ = done.stdout.split()
    assert name == "int4-6"
    assert 5 < float(bits) <= 6
    plans = json.loads(lowmem("plan", tmp_path / "new", "--json").stdout)["plans"]
    assert {plan["variant"] for plan in plans} == {"int4-6"}
    assert {plan["engine"] for plan in plans} == {"torch", "onnxruntime"}
    # The same words find it there.
    lowmem("export", cli_bundle.parent / "checkpoint", tmp_path / "new", *contract, *options)


def test_export_is_steered_by_texts_of_ones_own(cli_bundle, tmp_path):
    long = "and so on " * 1000
    (tmp_path / "texts.txt").write_text(f"One text.\nAnother text, and a longer one.\n{long}\n")
    contract = ("--contract", cli_bundle.parent / "contract.json")
    options = ("--variants", "int4", "--no-onnx", "--calibration", tmp_path / "texts.txt")
    done = lowmem("export", cli_bundle.parent / "checkpoint", tmp_path / "own", *contract, *options)
    assert "calibrating: 5 steps" in done.stderr
    assert "tokens: 1 of 3; the first is 3" in done.stderr
    manifest = json.loads((tmp_path / "own" / "lowmem.json").read_text())
    jsonschema.validate(manifest, schemas.load("manifest"))
    assert len(manifest["variants"]["int4"]["recipe"]["calibration"]) == 64


def test_texts_to_calibrate_by_that_are_missing_are_one_error_before_anything(cli_bundle, tmp_path):
    contract = ("--contract", cli_bundle.parent / "contract.json", "--calibration")
    (tmp_path / "empty.txt").write_text("")
    for file, said in (("none.txt", "none.txt"), ("empty.txt", "empty.txt holds no text")):
        words = ("export", cli_bundle.parent / "checkpoint", tmp_path / "new", *contract)
        assert said in lowmem(*words, tmp_path / file, status=1).stderr
        assert not (tmp_path / "new").exists()


def test_plan_json_follows_its_schema_and_chooses_from_many(cli_bundle):
    plan = json.loads(lowmem("plan", cli_bundle, "--engine", "torch", "--json").stdout)
    jsonschema.validate(plan, schemas.load("plan"))
    running = [one for one in plan["plans"] if one["state"] == "candidate"]
    assert len(running) >= 10
    assert all(one["tokens_per_second"] > 0 for one in running)
    chosen = next(one for one in running if one["id"] == plan["chosen"])
    assert chosen["reason"] == plan["reason"]
    assert (chosen["variant"], chosen["fidelity"]) == ("fp16", "unverified")
    # Without a report the reference's own arithmetic needs no warning; native bf16, where it wins,
    # does.
    assert (plan["warning"] is None) == (chosen["compute"] == "fp32")
    named = lowmem("plan", cli_bundle, "--variant", "int4", *FP32, "--json")
    assert "has no fidelity report" in json.loads(named.stdout)["warning"]


def test_the_plan_table_fits_80_columns(cli_bundle):
    text = lowmem("plan", cli_bundle, "--variant", "fp16", *FP32).stdout
    table = [line for line in text.splitlines() if " torch " in line or "variant" in line]
    assert table
    assert max(map(len, table)) <= 80


def test_planning_a_checkpoint_needs_its_config_alone(cli_bundle, tmp_path):
    shutil.copy(cli_bundle / "fp16" / "config.json", tmp_path)
    shown = lowmem("plan", tmp_path).stdout
    assert "nothing is exported yet" in shown
    assert "int4" in shown


def test_info_verifies_and_names_strays(cli_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(cli_bundle, copy)
    (copy / "notes.txt").write_text("mine")
    assert "stray: notes.txt" in lowmem("info", copy, "--verify").stdout


def test_info_names_every_damaged_file(cli_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(cli_bundle, copy)
    for name in ("int4/config.json", "fp16/tokenizer.json"):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    done = lowmem("info", copy, "--verify", status=1)
    assert done.stderr.startswith("lowmem: error: ")
    assert "int4/config.json is damaged" in done.stderr
    assert "fp16/tokenizer.json is damaged" in done.stderr


def test_rows_of_a_file_may_be_queries_of_their_own(cli_bundle, tmp_path):
    rows = [
        {"text": TEXTS[0]},
        {"text": TEXTS[0], "input_type": "query", "task": "same"},
        {"text": TEXTS[0], "input_type": "query"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lowmem("embed", cli_bundle, file, tmp_path / "v.npy", "--variant", "fp16", *FP32)
    vectors = np.load(tmp_path / "v.npy")
    assert len({vector.tobytes() for vector in vectors}) == 3


def test_the_chosen_plan_and_its_reason_go_to_stderr(cli_bundle, tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    options = ("--variant", "fp16", *FP32)
    done = lowmem("embed", cli_bundle, tmp_path / "t.txt", tmp_path / "v.jsonl", *options)
    told = " ".join(done.stderr.split())
    assert "plan fp16-torch-cpu-fp32-resident: no plan is verified" in told
    assert done.stdout.startswith("2 vectors of 128 dimensions")
    lines = (tmp_path / "v.jsonl").read_text().splitlines()
    assert len(json.loads(lines[1])["embedding"]) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere"), "nowhere is not there"),
        (("embed", "BUNDLE", "missing.txt", "v.npy"), "missing.txt"),
        (("embed", "BUNDLE", "t.txt", "v.csv"), "v.csv"),
        (("embed", "BUNDLE", "t.txt", "v.npy", "--variant", "int3"), "variant must be auto or one"),
        (("embed", "BUNDLE", "empty.txt", "v.npy"), "line 2 of empty.txt is empty"),
        (("embed", "BUNDLE", "long.txt", "v.npy", "--variant", "fp16", *FP32), "line 2 of long"),
        (("embed", "BUNDLE", "long.txt", "v.npy"), "line 2 of long"),
        (("embed", "BUNDLE", "t.txt", "v.npy", "--task", "same"), "a task is for queries"),
        (("plan", "BUNDLE", "--floor", "high"), "strict, standard, loose"),
        (("plan", "BUNDLE", "--engine", "jax"), "engine must be auto or one of"),
        (("report", "BUNDLE", "--json", "no/where.json"), "its directory does not exist"),
        (("report", "BUNDLE", "--task", "same"), "--task is the instruction of --retrieval, which"),
        (("report", "BUNDLE", "--sts-task", "same"), "--sts-task is the instruction of --sts, wh"),
        (("report", "BUNDLE", "--column", "body"), "--column is where the text is in --texts, wh"),
        (("report", "BUNDLE", "--texts", "nothing.txt"), "nothing.txt holds no text"),
        (("report", "BUNDLE", "--texts", "same.jsonl"), "no task 'SAME': its name"),
        (("report", "BUNDLE", "--reference", "v.csv"), "v.csv cannot be read as .npy"),
        (
            ("export", "BUNDLE/fp16", "new"),
            "its files fit no known model: give --contract NAME (of",
        ),
        (("export", "BUNDLE/fp16", "new", "--contract", "c.json"), "one of linq, e5-mistral, sfr"),
        (("export", "BUNDLE/fp16", "new", "--contract", "{" * 300), "one of linq, e5-mistral, sfr"),
        (("export", "BUNDLE/fp16", "new", "--variants", "int3"), "a variant must be one of fp16"),
        (("export", "BUNDLE/fp16", "new", "--variants", "int4-9"), "BITS from 4.5 to 8.25, got"),
        (("export", "BUNDLE/fp16", "new", "--bits", "3"), "bits must be from 4.5 to 8.25, got 3"),
        (("export", "BUNDLE/fp16", "new", "--bits", "nan"), "bits must be from 4.5 to 8.25"),
        (
            ("export", "BUNDLE/fp16", "new", "--variants", "int8", "--bits", "6"),
            "--bits needs int4 among the variants",
        ),
        (("export", "/no/such/model", "new"), "there is no /no/such/model"),
        (("plan", "/no/such/bundle"), "a bundle, a model directory or a hub id ORG/NAME, and"),
        (("plan", "t.txt"), "and 't.txt' is none: export it first"),
        (("export", *SOURCE, "new", "--device", "tpu"), "device must be auto or one of"),
        (("export", *SOURCE, "new", "--max-memory", "much"), "--max-memory must be a size such as"),
        (("export", *SOURCE, "new", "--max-memory", "90M"), "reference vectors may need"),
        (
            ("export", *SOURCE, "new", "--variants", "int8", "--reference-texts", "quick"),
            "--reference-texts quick needs fp16 among the variants",
        ),
        (("export", *SOURCE, "new", "--calibration", "q.jsonl"), "a query needs a task for this"),
        (
            ("export", *SOURCE, "new", "--max-memory", "90M", "--reference-texts", "none"),
            "of memory, 90 MiB are allowed",
        ),
        (("check", "BUNDLE", "--answers", "x" * 300), "is neither"),
        (("check", "BUNDLE"), "does not say which known model it holds"),
        (("export", "nothing.gguf", "new", "--contract", "linq"), "nothing.gguf"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else value[0],
)
def test_bad_input_gets_one_line_and_status_1(
    cli_bundle, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("one\n")
    (tmp_path / "nothing.txt").write_text("")
    query = {"text": "one", "input_type": "query"}
    (tmp_path / "q.jsonl").write_text(json.dumps(query) + "\n")
    (tmp_path / "same.jsonl").write_text(json.dumps({**query, "task": "SAME"}) + "\n")
    (tmp_path / "empty.txt").write_text("one\n\nthree\n")
    (tmp_path / "long.txt").write_text("one\n" + "word " * 500 + "\n")
    done = lowmem(*(word.replace("BUNDLE", str(cli_bundle)) for word in arguments), status=1)
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("lowmem: error: ")
    assert message in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "v.npy").exists()


def test_what_the_system_refuses_is_one_line(monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("lowmem.cli.info.Bundle", full)
    done = lowmem("info", "somewhere", status=1)
    assert done.stderr == ("lowmem: error: [Errno 28] No space left on device: 'somewhere'\n")


def test_without_a_stderr_a_command_does_its_work(cli_bundle):
    command = f"{sys.executable} -m lowmem info {cli_bundle} --json 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["variants"]


@pytest.mark.parametrize(
    ("words", "status", "stdout", "stderr"),
    [
        (("--version",), 0, f"lowmem {version('lowmem')}\n", ""),
        (("info", "nowhere"), 1, "", "lowmem: error: "),
        (("plan", "nowhere", "--nonsense"), 2, "", "Usage: "),
    ],
)
def test_the_program_itself_ends_with_its_status(words, status, stdout, stderr):
    command = [sys.executable, "-m", "lowmem", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, stdout)
    assert done.stderr.startswith(stderr)
