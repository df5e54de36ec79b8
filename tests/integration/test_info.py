"""What ``lowmem info`` says of reports."""

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner

from lowmem.artifact.manifest import Bundle
from lowmem.cli import app
from tests.bundles import edit


def test_a_report_belongs_to_the_longest_variant_that_its_plan_begins_with(
    exported: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    variants = json.loads((bundle / "lowmem.json").read_text())["variants"]
    edit(bundle, variants={**variants, "int4-5.5": variants["int8"]})
    opened = Bundle(bundle)
    (bundle / "reports").mkdir()
    for variant in ("int4", "int4-5.5"):
        report = {
            "plan": f"{variant}-torch-cpu-fp32",
            "artifact_sha256": opened.artifact_sha256(variant),
            "cosine": {"mean": 0.99},
            "texts": {},
        }
        (bundle / "reports" / f"{report['plan']}.json").write_text(json.dumps(report))
    shown = CliRunner().invoke(app, ["info", str(bundle), "--json"])
    assert {one["plan"]: one["current"] for one in json.loads(shown.stdout)["reports"]} == {
        "int4-torch-cpu-fp32": True,
        "int4-5.5-torch-cpu-fp32": True,
    }


def test_a_result_that_lies_among_the_reports_is_passed_over(
    exported: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    (bundle / "reports").mkdir()
    (bundle / "reports" / "mine.json").write_text(json.dumps({"format": 1, "reports": []}))
    shown = CliRunner().invoke(app, ["info", str(bundle), "--json"])
    assert json.loads(shown.stdout)["reports"] == []
    (bundle / "reports" / "other.json").write_text(json.dumps({"plan": 1, "cosine": {"mean": []}}))
    failed = CliRunner().invoke(app, ["info", str(bundle)])
    assert "a report needs plan, cosine, texts and artifact_sha256" in str(failed.exception)
