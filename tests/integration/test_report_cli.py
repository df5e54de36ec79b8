"""``lowmem report`` as a user meets it, and what follows from its reports."""

import json
import shutil

import jsonschema
import numpy as np
import pytest

from lowmem import data, schemas
from lowmem.fidelity import neighbours
from tests.command_line import lowmem
from tests.tolerances import INVARIANCE_DISTANCE

FP32 = ("--engine", "torch", "--compute", "fp32")


@pytest.fixture(scope="module")
def reported(cli_bundle, tmp_path_factory):
    """The bundle with reports of two plans, and what ``report`` wrote besides."""
    folder = tmp_path_factory.mktemp("reported")
    copy = folder / "bundle"
    shutil.copytree(cli_bundle, copy)
    done = lowmem(
        *("report", copy, "--variant", "int8", "--engine", "torch", "--floor", "loose"),
        *("--json", folder / "report.json", "--html", folder / "report.html"),
        *("--dump", folder / "dump"),
    )
    return copy, folder, done


def test_report_figures_follow_from_the_dumped_vectors(reported):
    _, folder, _ = reported
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, schemas.load("report"))
    reference = np.load(folder / "dump" / "reference.npy")
    assert {one["plan"] for one in report["reports"]} >= {"int8-torch-cpu-fp32"}
    for one in report["reports"]:
        vectors = np.load(folder / "dump" / f"{one['plan']}.npy")
        products = np.einsum("ij,ij->i", reference, vectors, dtype=np.float64)
        lengths = np.linalg.norm(reference.astype(np.float64), axis=1)
        lengths *= np.linalg.norm(vectors.astype(np.float64), axis=1)
        cosines = products / lengths
        figures = {
            "mean": cosines.mean(),
            "median": np.median(cosines),
            "p5": np.quantile(cosines, 0.05),
            "p1": np.quantile(cosines, 0.01),
            "min": cosines.min(),
        }
        assert one["cosine"] == pytest.approx(figures, abs=1e-6)
        before, now = neighbours.find(reference, 10), neighbours.find(vectors, 10)
        assert one["overlap"]["10"] == pytest.approx(neighbours.overlap(before, now, 10))


def test_a_report_is_wholly_described_by_its_schema(reported):
    _, folder, _ = reported
    report = json.loads((folder / "report.json").read_text())
    schema = schemas.load("report")
    assert set(report) == set(schema["properties"])
    described = schema["$defs"]["report"]["properties"]
    for one in report["reports"]:
        assert set(one) == set(described)
        assert one["readiness"]["caution"] == "a smoke test on 64 texts, not a sign-off"
        assert one["invariance"]["texts"] == 6
        assert one["calibration"] == {"texts": "none", "shared": None}
        assert one["search"]["queries"] + one["search"]["documents"] == 64
    pairs = {(one["a"], one["b"]) for one in report["agreement"]}
    assert len(pairs) == len(report["reports"]) * (len(report["reports"]) - 1) / 2


def test_what_report_prints_fits_80_columns(reported):
    _, _, done = reported
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "note: a smoke test on 64 texts, not a sign-off" in done.stdout


def test_a_report_on_own_texts_with_search_pairs_a_limit_and_drift(cli_bundle, tmp_path):
    """The whole of ``report``: a part of the texts, judged sets, another reference, and drift."""
    rows = [{"text": f"the fox and the day {n}", "lang": "en"} for n in range(30)]
    rows += [{"text": f"what is the quest {n}?", "input_type": "query"} for n in range(10)]
    texts, collection, pairs = (tmp_path / name for name in ("t.jsonl", "set", "pairs.jsonl"))
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collection.mkdir()
    documents = "".join(f'{{"_id": "d{n}", "text": "the day {n}"}}\n' for n in range(30))
    (collection / "corpus.jsonl").write_text(documents)
    (collection / "queries.jsonl").write_text('{"_id": "q", "text": "what day is it?"}\n')
    (collection / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    scored = (f'{{"a": "the fox {n}", "b": "the day", "score": {n}}}\n' for n in range(9))
    pairs.write_text("".join(scored))
    options = ("--texts", texts, "--limit", 12, "--variant", "int8", *FP32, "--floor", "loose")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    judged = ("--retrieval", collection, "--task", "same", "--sts", pairs, "--sts-task", "same")
    done = lowmem(
        "report", cli_bundle, *options, *judged, "--json", first, "--dump", tmp_path / "d"
    )
    [report] = json.loads(first.read_text())["reports"]
    assert (report["texts"]["count"], report["texts"]["all"]) == (12, 40)
    assert (report["retrieval"]["documents"], report["retrieval"]["all_documents"]) == (12, 30)
    assert report["sts"]["pairs"] == 9
    assert {one["name"] for one in report["buckets"] if one["kind"] == "language"} == {"en"}
    assert "12 of 40 texts (t.jsonl)" in done.stdout
    assert "search (set): 1 queries, 12 documents" in done.stdout
    assert "similarity (pairs.jsonl): 9 pairs" in done.stdout
    assert "1 plan, " in done.stderr
    assert not (cli_bundle / "reports" / "int8-torch-cpu-fp32.json").exists()

    again = lowmem("report", cli_bundle, *options, "--json", second, "--compare", first)
    drift = json.loads(second.read_text())["drift"]
    assert drift["rows"][0]["worsened"] == []
    jsonschema.validate(json.loads(second.read_text()), schemas.load("report"))
    assert "drift against first.json: new less old" in again.stdout

    theirs = tmp_path / "theirs.npy"
    options = ("--texts", tmp_path / "d" / "texts.jsonl", *options[4:])
    np.save(theirs, np.load(tmp_path / "d" / "reference.npy").astype(np.float16))
    lowmem("report", cli_bundle, *options, "--reference", theirs, "--json", second)
    [given] = json.loads(second.read_text())["reports"]
    assert (given["reference_given"], given["reference_checked"]) == ("theirs.npy", 8)
    assert given["cosine"]["mean"] == pytest.approx(report["cosine"]["mean"], abs=1e-4)
    np.save(theirs, np.load(theirs)[::-1])
    refused = lowmem("report", cli_bundle, *options, "--reference", theirs, status=1)
    assert "so they are in another order" in refused.stderr
    refused = lowmem("report", cli_bundle, *FP32, "--compare", first, status=1)
    assert "first.json is about other texts (t.jsonl, 12 texts)" in refused.stderr
    before = first.read_text()
    again = ("--compare", first, "--json", first)
    refused = lowmem("report", cli_bundle, *options, *again, status=1)
    assert "first.json cannot be written: the command names that file twice" in refused.stderr
    assert first.read_text() == before


def test_reference_vectors_that_export_left_out_are_made_by_the_first_report(cli_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(cli_bundle, copy)
    shutil.rmtree(copy / "reference")
    options = ("--variant", "int8", *FP32, "--floor", "loose", "--limit", 8)
    done = lowmem("report", copy, *options)
    assert "8 of " in done.stdout
    made = [np.load(file) for file in sorted((copy / "reference").glob("*.npy"))]
    assert [len(vectors) for vectors in made] == [len(data.load("probe"))]
    before = {file: file.stat().st_mtime_ns for file in (copy / "reference").iterdir()}
    lowmem("report", copy, *options)
    assert {file: file.stat().st_mtime_ns for file in (copy / "reference").iterdir()} == before


def test_what_a_user_judges_by_does_not_go_into_the_bundle(cli_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(cli_bundle, copy)
    pairs, file = tmp_path / "pairs.jsonl", tmp_path / "report.json"
    scored = (f'{{"a": "the fox {n}", "b": "the day", "score": {n}}}\n' for n in range(9))
    pairs.write_text("".join(scored))
    options = ("--variant", "int8", *FP32, "--floor", "loose", "--sts", pairs, "--json", file)
    lowmem("report", copy, *options)
    [shown] = json.loads(file.read_text())["reports"]
    assert shown["sts"]["name"] == "pairs.jsonl"
    stored = json.loads((copy / "reports" / "int8-torch-cpu-fp32.json").read_text())
    assert stored["sts"] is None
    assert "pairs.jsonl" not in (copy / "reports" / "int8-torch-cpu-fp32.html").read_text()


def test_texts_that_are_cut_are_counted(cli_bundle, tmp_path):
    texts, page = tmp_path / "t.txt", tmp_path / "report.html"
    texts.write_text("".join(f"the fox {n}\n" for n in range(9)) + "word " * 500 + "\n")
    options = ("--texts", texts, "--variant", "int8", *FP32, "--floor", "loose")
    done = lowmem("report", cli_bundle, *options, "--html", page)
    assert "1 of 10 texts are cut to the 128 tokens that the model takes" in done.stderr
    assert "The ends of 1 text, cut to the 128 tokens that the model takes." in page.read_text()


def test_embed_gives_the_dumped_vectors(reported, tmp_path):
    bundle, folder, _ = reported
    options = ("--variant", "int8", *FP32, "--truncate")
    lowmem("embed", bundle, folder / "dump" / "texts.jsonl", tmp_path / "v.npy", *options)
    dumped = np.load(folder / "dump" / "int8-torch-cpu-fp32.npy")
    distances = np.linalg.norm(np.load(tmp_path / "v.npy") - dumped, axis=1)
    assert distances.max() < INVARIANCE_DISTANCE


def test_a_report_in_the_bundle_makes_a_plan_verified(reported):
    bundle, _, done = reported
    assert "pass" in done.stdout
    assert (bundle / "reports" / "int8-torch-cpu-fp32.html").exists()
    options = ("--variant", "int8", *FP32, "--floor", "loose", "--json")
    plan = json.loads(lowmem("plan", bundle, *options).stdout)
    assert plan["plans"][0]["fidelity"] == "verified"
    assert "passes the floor loose" in plan["reason"]


def test_a_report_below_the_floor_ends_with_status_3(cli_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(cli_bundle, copy)
    options = ("--variant", "int4", *FP32, "--floor", "mean=1,p5=1,min=1")
    done = lowmem("report", copy, *options, status=3)
    assert "fail" in done.stdout
    named = lowmem("plan", copy, "--variant", "int4", *FP32, "--floor", "mean=1,p5=1,min=1")
    assert "asked for by name, though its report fails" in named.stdout


def test_a_report_of_another_export_judges_nothing(reported, tmp_path):
    bundle, _, _ = reported
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    report = copy / "reports" / "int8-torch-cpu-fp32.json"
    value = json.loads(report.read_text())
    report.write_text(json.dumps({**value, "artifact_sha256": "0" * 64}))
    options = ("--variant", "int8", *FP32, "--floor", "loose", "--json")
    assert json.loads(lowmem("plan", copy, *options).stdout)["plans"][0]["fidelity"] == "unverified"
