"""The one public class, over a tiny exported bundle."""

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.pipeline import export
from export.sources import open_source
from lowmem import Embedder, InputError
from lowmem.artifact.manifest import Bundle
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from tests.models import CONTRACT, EOS, HIDDEN_SIZE, tiny_checkpoint
from tests.tolerances import INVARIANCE_DISTANCE, gamma

CONTRACTS = {
    "usual": replace(CONTRACT, document_template="Passage: {text}"),
    "no default task": replace(CONTRACT, default_task=None),
    "not normalised": replace(CONTRACT, normalize_embeddings=False),
}
TEXTS = ["the quick fox", "a", "what is the distance of the moon?"]
TASK = CONTRACT.tasks["retrieval"]


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As ``cache_directory``, in time for the fixtures below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("embedder")
    source = open_source(tiny_checkpoint(folder / "source").path)
    for name, contract in CONTRACTS.items():
        export(source, folder / name, contract, variants=["fp16"], onnx=False)
    return {name: folder / name for name in CONTRACTS}


def embedder(path: Path) -> Embedder:
    return Embedder(
        Runner(Bundle(path), Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1))
    )


@pytest.fixture(scope="module")
def model(bundles: dict[str, Path]) -> Embedder:
    return embedder(bundles["usual"])


def with_prompts(model: Embedder, prompt: str) -> NDArray[np.float32]:
    return model.embed(TEXTS, [prompt] * len(TEXTS))


def test_one_string_gives_one_vector(model: Embedder) -> None:
    vector = model.encode(TEXTS[0])
    assert vector.shape == (HIDDEN_SIZE,)
    assert np.array_equal(vector, model.encode([TEXTS[0]])[0])


def test_many_strings_give_float32_rows_of_unit_length_in_their_order(model: Embedder) -> None:
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, HIDDEN_SIZE)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert np.abs(lengths - 1).max() < gamma(2)
    backwards = model.encode(TEXTS[::-1])
    assert np.abs(backwards[::-1] - vectors).max() < INVARIANCE_DISTANCE


def test_no_strings_give_no_rows(model: Embedder) -> None:
    assert model.encode([]).shape == (0, HIDDEN_SIZE)
    assert model.encode([], truncate_dim=5).shape == (0, 5)
    assert model.encode_query([]).shape == (0, HIDDEN_SIZE)


def test_any_sequence_of_strings_is_taken(model: Embedder) -> None:
    expected = model.encode(TEXTS)
    for sentences in (tuple(TEXTS), np.array(TEXTS)):
        assert np.array_equal(model.encode(sentences), expected)


@pytest.mark.parametrize("sentences", [b"bytes", {"a", "b"}, {"a": 1}, None])
def test_anything_but_strings_in_order_is_refused(model: Embedder, sentences: Any) -> None:
    with pytest.raises(InputError, match="must be a string or a sequence of strings"):
        model.encode(sentences)


@pytest.mark.parametrize(
    ("sentences", "which"),
    [([1, 2], "0 is int"), (["a", None], "1 is NoneType"), ([["a"]], "0 is list")],
)
def test_what_is_no_string_among_sentences_is_named(
    model: Embedder, sentences: Any, which: str
) -> None:
    with pytest.raises(InputError, match=f"sentences must be strings, and number {which}"):
        model.encode(sentences)


def test_a_text_is_a_document_unless_said_otherwise(model: Embedder) -> None:
    expected = with_prompts(model, "Passage: ")
    for vectors in (
        model.encode(TEXTS),
        model.encode_document(TEXTS),
        model.encode(TEXTS, prompt_name="document"),
        model.encode(TEXTS, prompt="Passage: "),
    ):
        assert np.array_equal(vectors, expected)
    assert not np.array_equal(with_prompts(model, ""), expected)


def test_an_empty_prompt_is_no_prompt(model: Embedder) -> None:
    assert np.array_equal(model.encode(TEXTS, prompt=""), with_prompts(model, ""))
    assert np.array_equal(model.encode_query(TEXTS, prompt=""), with_prompts(model, ""))
    assert np.array_equal(model.encode_document(TEXTS, prompt=""), with_prompts(model, ""))


def test_a_query_without_a_task_has_the_contracts_default_task(model: Embedder) -> None:
    expected = with_prompts(model, f"Instruct: {TASK}\nQuery: ")
    for vectors in (
        model.encode_query(TEXTS),
        model.encode_query(TEXTS, prompt=None),
        model.encode_query(TEXTS, task="retrieval"),
        model.encode_query(TEXTS, task=TASK),
        model.encode_query(TEXTS, prompt_name="retrieval"),
        model.encode(TEXTS, prompt_name="query"),
        model.encode(TEXTS, prompt_name="retrieval"),
    ):
        assert np.array_equal(vectors, expected)


def test_a_task_may_be_any_instruction(model: Embedder) -> None:
    expected = with_prompts(model, "Instruct: Find the fox\nQuery: ")
    assert np.array_equal(model.encode_query(TEXTS, task="Find the fox"), expected)


def test_a_query_needs_a_task_where_the_contract_has_no_default(bundles: dict[str, Path]) -> None:
    model = embedder(bundles["no default task"])
    for ask in (
        lambda: model.encode_query(TEXTS),
        lambda: model.encode(TEXTS, prompt_name="query"),
    ):
        with pytest.raises(InputError, match=r"needs a task .* \(known: retrieval, same\)"):
            ask()
    same = model.encode_query(TEXTS, task="same")
    literal = model.encode_query(TEXTS, prompt="Instruct: Find the same text\nQuery: ")
    assert np.array_equal(same, literal)


@pytest.mark.parametrize("name", ["queries", "", "Retrieval"])
def test_an_unknown_prompt_name_is_refused(model: Embedder, name: str) -> None:
    known = "query, document, retrieval, same"
    with pytest.raises(InputError, match=f"must be one of {known}, got {name!r}"):
        model.encode(TEXTS, prompt_name=name)


def test_two_prompts_at_once_are_refused(model: Embedder) -> None:
    with pytest.raises(InputError, match="give prompt or prompt_name, not both"):
        model.encode(TEXTS, prompt="a", prompt_name="query")
    for extra in ({"prompt": "a"}, {"prompt_name": "same"}):
        with pytest.raises(InputError, match="task, prompt or prompt_name, one of them"):
            model.encode_query(TEXTS, task="retrieval", **extra)


def test_neighbours_do_not_change_a_vector(model: Embedder) -> None:
    together = model.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.linalg.norm(model.encode([text])[0] - vector) < INVARIANCE_DISTANCE
    one_by_one = model.encode(TEXTS, batch_size=1)
    assert np.linalg.norm(one_by_one - together, axis=1).max() < INVARIANCE_DISTANCE


def test_each_text_may_have_its_own_prompt(model: Embedder) -> None:
    prompts = ["", "Passage: ", f"Instruct: {TASK}\nQuery: "]
    vectors = model.embed(TEXTS, prompts)
    for text, prompt, vector in zip(TEXTS, prompts, vectors, strict=True):
        assert np.abs(model.encode(text, prompt=prompt) - vector).max() < INVARIANCE_DISTANCE


def test_a_text_over_the_limit_is_refused(model: Embedder) -> None:
    with pytest.raises(InputError, match=r"may have 128 tokens, .* text 1 \(3\d\d tokens\)"):
        model.encode(["fine", "x" * 300])


def test_a_cut_text_is_reported_and_keeps_its_eos(
    model: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lowmem"):
        vectors = model.encode(["fine", "x" * 300, "y" * 400], prompt="", truncate=True)
    assert [record.getMessage() for record in caplog.records] == [
        "texts cut to 128 tokens: 2, by up to 274 tokens; the first is text 1"
    ]
    (cut,) = model._runner.tokenizer.encode(["x" * 300], [""], truncate=True)
    assert cut.input_ids[-1] == EOS
    assert (
        np.abs(model._runner.embed([cut], normalize=True)[0] - vectors[1]).max()
        < INVARIANCE_DISTANCE
    )


def test_a_cut_text_is_called_by_its_name(
    model: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lowmem"):
        model.embed(["x" * 300], [""], names=["line 7 of a.txt"], truncate=True)
    assert "the first is line 7 of a.txt" in caplog.text


def test_nothing_is_said_where_nothing_is_cut(
    model: Embedder, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model.encode(TEXTS, truncate=True, show_progress_bar=True)
    assert not caplog.records
    assert capfd.readouterr().out == ""


def test_leading_dimensions_are_normalised_again(model: Embedder) -> None:
    whole, short = model.encode(TEXTS), model.encode(TEXTS, truncate_dim=16)
    lead = whole[:, :16].astype(np.float64)
    expected = lead / np.linalg.norm(lead, axis=1, keepdims=True)
    assert short.shape == (3, 16)
    assert np.abs(short - expected).max() < gamma(4)
    assert np.array_equal(model.encode(TEXTS, truncate_dim=HIDDEN_SIZE).shape, whole.shape)


def test_vectors_keep_their_length_if_asked_to(model: Embedder) -> None:
    raw, unit = model.encode(TEXTS, normalize_embeddings=False), model.encode(TEXTS)
    lengths = np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1
    assert np.abs(raw / lengths - unit).max() < gamma(4)
    short = model.encode(TEXTS, normalize_embeddings=False, truncate_dim=16)
    assert np.array_equal(short, raw[:, :16])


def test_a_contract_without_normalisation_is_followed_unless_said_otherwise(
    bundles: dict[str, Path],
) -> None:
    model = embedder(bundles["not normalised"])
    raw = model.encode(TEXTS)
    assert np.array_equal(raw, model.encode(TEXTS, normalize_embeddings=False))
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    unit = model.encode(TEXTS, normalize_embeddings=True)
    assert np.abs(np.linalg.norm(unit.astype(np.float64), axis=1) - 1).max() < gamma(2)


def test_a_graph_that_normalises_cannot_be_asked_not_to(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedder(bundles["usual"])
    monkeypatch.setattr(model._runner, "normalizes", True)
    with pytest.raises(InputError, match="normalises inside its graph"):
        model.encode(TEXTS, normalize_embeddings=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"truncate_dim": 0}, "truncate_dim must be from 1 to 128, got 0"),
        ({"truncate_dim": 129}, "truncate_dim must be from 1 to 128, got 129"),
    ],
)
def test_options_out_of_range_are_refused(
    model: Embedder, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.encode(TEXTS, **options)


def test_similarity_is_the_cosine_of_every_pair(model: Embedder) -> None:
    left = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    right = 5 * np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    scores = model.similarity(left, right)
    wide = [side.astype(np.float64) for side in (left, right)]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in wide]
    assert scores.dtype == np.float32
    assert scores.shape == (3, 2)
    assert np.abs(scores - unit[0] @ unit[1].T).max() < gamma(8 + 4)


def test_similarity_takes_single_vectors_and_other_dtypes(model: Embedder) -> None:
    vector = model.encode(TEXTS[0])
    for other in (vector, vector.astype(np.float64), vector.tolist()):
        scores = model.similarity(vector, other)
        assert scores.shape == (1, 1)
        assert scores.dtype == np.float32
        assert abs(float(scores[0, 0]) - 1) < gamma(HIDDEN_SIZE)
    assert model.similarity(vector, np.zeros((0, HIDDEN_SIZE))).shape == (1, 0)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 4), (2, 5)), ((2, 4), (2, 4, 1)), ((3, 2, 4), (2, 4))]
)
def test_similarity_of_other_dimensions_is_refused(
    model: Embedder, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"similarity needs \[n, d\] and \[m, d\], got"):
        model.similarity(np.ones(first, np.float32), np.ones(second, np.float32))


def test_load_runs_the_plan_that_was_asked_for(bundles: dict[str, Path]) -> None:
    model = Embedder.load(
        str(bundles["usual"]),
        variant="fp16",
        engine="torch",
        device="cpu",
        compute="fp32",
        schedule="streamed",
    )
    assert model.plan.id == "fp16-torch-cpu-fp32-streamed"
    assert "no plan is verified" in model.plan.reason
    assert model.contract == CONTRACTS["usual"]
    assert (
        np.abs(model.encode(TEXTS) - embedder(bundles["usual"]).encode(TEXTS)).max()
        < INVARIANCE_DISTANCE
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"variant": "int4"}, "one of fp16, got 'int4'; lowmem export makes others"),
        ({"engine": "tensorrt"}, "engine must be auto or one of onnxruntime, torch"),
        ({"floor": "high"}, "a floor is strict, standard, loose, or"),
    ],
)
def test_load_refuses_what_does_not_exist(
    bundles: dict[str, Path], option: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Embedder.load(bundles["usual"], **option)


def test_importing_lowmem_loads_nothing_heavy() -> None:
    program = (
        "import sys, lowmem\n"
        "heavy = {'torch', 'onnxruntime', 'transformers', 'pyarrow', 'rich', 'typer', 'export'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_vectors_go_where_they_are_wanted(model: Embedder) -> None:
    texts = ["one", "two", "one"]
    out = np.full((3, model.dimensions), np.nan, np.float32)
    assert model.embed(texts, [""] * 3, out=out) is out
    np.testing.assert_array_equal(out, model.embed(texts, [""] * 3))


@pytest.mark.parametrize(("rows", "dtype"), [(2, np.float32), (1, np.float64)])
def test_vectors_that_do_not_fit_where_they_are_wanted_are_refused(
    model: Embedder, rows: int, dtype: type
) -> None:
    out = np.zeros((rows, model.dimensions), dtype)
    message = f"out must be float32 [1, {model.dimensions}], got {out.dtype} {list(out.shape)}"
    with pytest.raises(InputError, match=re.escape(message)):
        model.embed(["one"], [""], out=out)
