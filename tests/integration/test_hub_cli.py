"""The command line with a hub id, from plan to report, against a stand-in for the hub."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from lowmem import schemas
from tests.hub_server import COMMIT, Hub, serving
from tests.models import CONTRACT, tiny_checkpoint

NAME = "someone/tiny-embedder"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in with one model, which may not be used for everything."""
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", layers=1).path
    (checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with serving() as stand_in:
        stand_in.models[NAME] = checkpoint
        yield stand_in


@pytest.fixture
def place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user without a token or a cache works, with a contract at hand."""
    hub.files.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contract.json").write_text(json.dumps(CONTRACT.to_json()))
    return tmp_path


EXPORT = (
    *("export", NAME, "bundle", "--contract", "contract.json"),
    *("--variants", "fp16,int8", "--no-onnx", "--calibration", "none"),
)


def lowmem(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowmem", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == status, done.stderr
    return done


def on_a_terminal(*arguments: str, answer: str) -> tuple[int, str]:
    """Exit status, and what a terminal showed of a command that was given an answer."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lowmem", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL, env=environment
    ) as run:
        os.close(theirs)
        os.write(ours, answer.encode())
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # what Linux answers once the other end is closed
            pass
    os.close(ours)
    return run.returncode, shown.decode()


def test_planning_a_hub_id_brings_its_config_alone(hub: Hub, place: Path) -> None:
    plan = json.loads(lowmem("plan", NAME, "--json").stdout)
    jsonschema.validate(plan, schemas.load("plan"))
    assert plan["reason"].startswith("nothing is exported yet")
    assert {entry.split()[1] for entry in hub.files} == {"config.json"}


def test_a_directory_is_never_looked_for_on_the_hub(hub: Hub, place: Path) -> None:
    (place / NAME).mkdir(parents=True)
    asked = len(hub.paths)
    for verb in (("plan", NAME), EXPORT):
        assert "config.json cannot be read" in lowmem(*verb, status=1).stderr
    assert len(hub.paths) == asked


def test_export_without_a_contract_brings_no_weights(hub: Hub, place: Path) -> None:
    assert "or --contract FILE" in lowmem("export", NAME, "bundle", status=1).stderr
    assert {entry.split()[1] for entry in hub.files} == {"config.json"}


def test_without_a_terminal_the_licence_must_be_named(hub: Hub, place: Path) -> None:
    done = lowmem(*EXPORT, status=1)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"lowmem: error: the licence of {NAME}, 'cc-by-nc-4.0', may not permit every use: read "
        "it, and accept it with --accept-licence 'cc-by-nc-4.0'"
    )
    assert hub.got() == {"README.md", "config.json"}
    assert not (place / "bundle").exists()
    lowmem(*EXPORT, "--accept-licence", "mit", status=1)


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_on_a_terminal_the_licence_is_asked_about_once(
    hub: Hub, place: Path, answer: str, status: int
) -> None:
    got, shown = on_a_terminal(*EXPORT, "--reference-texts", "none", answer=answer)
    question = "The model's licence, 'cc-by-nc-4.0', may not permit every use. Do you accept it?"
    assert (got, shown.count(question)) == (status, 1), shown
    assert (place / "bundle" / "lowmem.json").exists() == (status == 0)
    assert ("model.safetensors" in hub.got()) == (status == 0)


def test_name_commit_and_licence_are_carried_to_manifest_info_and_report(
    hub: Hub, place: Path
) -> None:
    done = lowmem(*EXPORT, "--accept-licence", "CC-BY-NC-4.0", "--reference-texts", "quick")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["fp16", "int8"]
    assert f"downloading {NAME}: 3 steps\nlicence: cc-by-nc-4.0\n" in done.stderr
    manifest = json.loads((place / "bundle" / "lowmem.json").read_text())
    jsonschema.validate(manifest, schemas.load("manifest"))
    assert manifest["licence"] == "cc-by-nc-4.0"
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == (NAME, COMMIT)
    shown = lowmem("info", "bundle").stdout
    assert f"source    {NAME}@{COMMIT}  (sha256 " in shown
    assert "licence   cc-by-nc-4.0\n" in shown
    assert json.loads(lowmem("info", "bundle", "--json").stdout)["licence"] == "cc-by-nc-4.0"
    plan = ("--variant", "int8", "--engine", "torch", "--device", "cpu", "--compute", "fp32")
    lowmem("report", "bundle", *plan, "--floor", "loose", "--json", "report.json")
    reports = json.loads((place / "report.json").read_text())
    jsonschema.validate(reports, schemas.load("report"))
    assert [report["licence"] for report in reports["reports"]] == ["cc-by-nc-4.0"]


def test_a_source_that_names_no_licence_is_exported_and_it_is_said(place: Path) -> None:
    checkpoint = tiny_checkpoint(place / "tiny", layers=1).path
    options = ("--variants", "fp16", "--no-onnx", "--reference-texts", "none")
    contract = ("--contract", "contract.json")
    done = lowmem("export", str(checkpoint), "bundle", *contract, *options)
    assert "licence: none named by the source\n" in done.stderr
    assert "licence   none named by the source\n" in lowmem("info", "bundle").stdout
