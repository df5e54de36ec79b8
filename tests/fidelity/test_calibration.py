import pytest

from lowmem import data
from lowmem.artifact.manifest import Bundle
from lowmem.data import Row
from lowmem.fidelity.calibration import statement, steered_by

SHA256 = data.sha256(data.load("calibration"))


@pytest.mark.parametrize(
    ("recipe", "texts"),
    [
        ({}, "none"),
        ({"calibration": "none"}, "none"),
        ({"calibration": "calibration"}, "calibration"),
        ({"calibration": SHA256}, "calibration"),
        ({"calibration": "f" * 64}, "f" * 64),
    ],
)
def test_a_recipe_names_its_texts_or_their_hash(recipe: dict[str, str], texts: str) -> None:
    assert steered_by(recipe) == texts


def test_texts_are_compared_with_the_built_in_calibration_texts(tiny_bundle) -> None:
    copied = data.load("calibration")[7]
    rows = [Row("mine", "a text of my own"), Row("copied", f"He said: {copied.text}")]
    found = statement(Bundle(tiny_bundle), "calibration", rows)
    assert found["texts"] == "calibration"
    assert (found["shared"]["texts"], found["shared"]["count"]) == (1, 2)
    assert found["shared"]["ids"] == ["copied"]


@pytest.mark.parametrize("texts", ["none", "f" * 64])
def test_nothing_is_claimed_of_texts_that_are_not_known(tiny_bundle, texts: str) -> None:
    rows = [Row("mine", "a text of my own")]
    assert statement(Bundle(tiny_bundle), texts, rows) == {"texts": texts, "shared": None}
