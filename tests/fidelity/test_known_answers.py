"""Known answers: what is carried, how close a plan must come, and that a wrong contract shows."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, PreTrainedTokenizerFast

from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.models import known_models
from lowmem.artifact.verdict import FLOORS
from lowmem.cli.check import check
from lowmem.compute.engine import Runner, unit_length
from lowmem.compute.plan import Plan
from lowmem.embedder import Embedder
from lowmem.errors import BundleError, InputError
from lowmem.fidelity.known_answers import (
    KnownAnswers,
    built_in,
    compare,
    parse_answers,
    tolerance,
)
from tests.models import BOS, CONTRACT, EOS, tiny_checkpoint

FACTS = Path(__file__).parents[2] / "../shared/facts/known_answers.json"
STANDARD = FLOORS["standard"]
PLAN = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1)
FP32 = {"variant": "fp16", "engine": "torch", "device": "cpu", "compute": "fp32"}
TASK = "Find what answers the question"
QUERIES = ("what is the distance of the moon?", "who was the quick fox?")
DOCUMENTS = (
    "The moon is about 384,400 kilometres from the earth.",
    "The quick brown fox was the one that jumped over the dog.",
)
ANSWERS = KnownAnswers("here", TASK, QUERIES, DOCUMENTS, ((1.0, 2.0), (3.0, 4.0)), "fp32")

LAST_TOKEN = replace(CONTRACT, default_task=None)
MEAN = replace(
    LAST_TOKEN,
    query_template="<|user|>\n{task}\n<|embed|>\n{text}",
    document_template="<|embed|>\n{text}",
    eos_token_id=None,
    is_causal=False,
    pooling="mean",
)
WRONG = {
    "mean for last token": (LAST_TOKEN, {"pooling": "mean"}),
    "lost EOS": (LAST_TOKEN, {"eos_token_id": None}),
    "lost BOS": (LAST_TOKEN, {"bos_token_id": None}),
    "bidirectional for causal": (LAST_TOKEN, {"is_causal": False}),
    "one space too few": (LAST_TOKEN, {"query_template": "Instruct: {task}\nQuery:{text}"}),
    "causal for bidirectional": (MEAN, {"is_causal": True}),
    "last token for mean": (MEAN, {"pooling": "lasttoken"}),
    "an EOS too many": (MEAN, {"eos_token_id": EOS}),
    "another document template": (MEAN, {"document_template": "{text}"}),
}


# What is carried.


def test_every_known_model_has_known_answers() -> None:
    assert set(built_in()) == set(known_models())
    assert [name for name, answers in built_in().items() if answers.scores is None] == [
        "e5-mistral"
    ]
    made = {name: answers.arithmetic for name, answers in built_in().items()}
    assert made == {
        "linq": "fp32",
        "sfr": "fp32",
        "sfr-2": "fp32",
        "gritlm": "bf16",
        "nv-embed-v1": "autocast",
        "nv-embed-v2": "autocast",
        "e5-mistral": None,
    }


def test_the_carried_texts_and_scores_are_those_of_the_cards() -> None:
    if not FACTS.exists():
        pytest.skip(f"needs the shared facts, {FACTS}")
    cards = json.loads(FACTS.read_text())
    for name, answers in built_in().items():
        model = known_models()[name]
        card = cards[model.hub_id]
        prompt = model.contract.prompt("query", answers.task)
        if "queries" in card:
            assert [prompt + text for text in answers.queries] == card["queries"]
        else:
            assert list(answers.queries) == card["queries_without_instruction"]
            assert prompt == card.get("instruction") or prompt == card["query_instruction"]
        assert list(answers.documents) == card["documents"]
        if name == "gritlm":
            expected = 100 * np.array(card["cosine_3dp"]["gritlm_bf16"])
            np.testing.assert_allclose(answers.scores or (), expected, atol=1e-9)
        elif answers.scores is None:
            assert card["scores_x100"] is None
        else:
            expected = card["scores_x100"]["transformers"]
            assert [list(row) for row in answers.scores] == expected


def test_every_answer_fits_its_models_contract() -> None:
    for name, answers in built_in().items():
        assert answers.source.startswith("https://")
        assert known_models()[name].contract.prompt("query", answers.task)
        if answers.scores is not None:
            assert np.shape(answers.scores) == (len(answers.queries), len(answers.documents))


def answers_json(**change: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(ANSWERS))) | change


def test_what_is_written_is_read() -> None:
    assert parse_answers(answers_json(), "here") == ANSWERS
    without = answers_json(scores=None, arithmetic=None)
    assert parse_answers(without, "here") == replace(ANSWERS, scores=None, arithmetic=None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"note": "x"}, "unknown key 'note'"),
        ({"source": None}, "source must be a string, got null"),
        ({"task": 3}, "task must be a string, got a number"),
        ({"queries": []}, "queries must be a list of texts"),
        ({"documents": ["a", 1]}, "documents must be a list of texts"),
        ({"arithmetic": "fp8"}, "arithmetic must be one of fp32, bf16, autocast, got 'fp8'"),
        ({"arithmetic": None}, "arithmetic must be one of fp32, bf16, autocast, got None"),
        ({"scores": None}, "arithmetic must be null without scores"),
        ({"scores": [[1, 2]]}, "scores must hold a number from -100 to 100 for each query"),
        ({"scores": [[1, 2], [3, 101]]}, "scores must hold a number from -100 to 100"),
        ({"scores": [[1, 2], [3, True]]}, "scores must hold a number from -100 to 100"),
        ({"scores": [[1, 2], 3]}, "scores must hold a number from -100 to 100"),
    ],
)
def test_answers_that_break_a_rule_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_answers(answers_json(**change), "some.json")
    assert str(caught.value).startswith("the known answers in some.json are not valid: ")
    assert problem in str(caught.value)


def test_a_missing_key_is_named() -> None:
    value = answers_json()
    del value["task"]
    with pytest.raises(BundleError, match="missing key 'task'"):
        parse_answers(value, "some.json")


# How close a plan must come.


@pytest.mark.parametrize(
    ("arithmetic", "fp32", "sixteen_bits"),
    [("fp32", 0.05, 0.2), ("bf16", 0.2, 0.3), ("autocast", 0.2, 0.3)],
)
def test_the_tolerance_is_that_of_the_card_and_of_the_plan(
    arithmetic: str, fp32: float, sixteen_bits: float
) -> None:
    def value(**plan: str) -> float:
        return tolerance(arithmetic, PLAN.with_(**plan), STANDARD, 4096).value

    assert value() == fp32
    assert value(compute="bf16") == value(compute="fp16") == sixteen_bits
    quantized = value(variant="int4")
    assert quantized == value(variant="int8", compute="bf16") == value(compute="int8")
    assert 4 < quantized - sixteen_bits < 4.2  # 100 (1 - .985^2) = 2.98, and 1.14 of chance


def test_a_stricter_floor_allows_less_and_the_reason_names_it() -> None:
    plan = PLAN.with_(variant="int4")
    allowed = [tolerance("fp32", plan, FLOORS[name], 4096) for name in ("strict", "loose")]
    assert allowed[0].value < 1.4
    assert allowed[1].value > 10
    assert allowed[0].reason.endswith("a mean cosine of 0.997, the floor strict, moves a score by")


@pytest.mark.parametrize("variant", ["int8", "bnb-int8", "int4", "bnb-nf4"])
def test_quantization_moves_scores_by_no_more_than_its_cosine_allows(
    tiny_bundle: Path, variant: str
) -> None:
    texts = [f"{text} {number}" for number in range(24) for text in (*QUERIES, *DOCUMENTS)]
    exact = embedder(tiny_bundle, PLAN).encode(texts)
    rounded = embedder(tiny_bundle, PLAN.with_(variant=variant)).encode(texts)
    mean = float(np.einsum("ij,ij->i", exact, rounded).mean())
    floor = replace(STANDARD, mean=mean)
    allowed = tolerance("fp32", PLAN.with_(variant=variant), floor, exact.shape[1])
    moved = 100 * np.abs(exact @ exact.T - rounded @ rounded.T)
    # Three standard deviations, of many pairs: one in a hundred may be further off.
    assert np.quantile(moved, 0.99) <= allowed.value


# That a wrong contract shows.


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    return tiny_checkpoint(folder / "tiny", max_position_embeddings=4096).path


def embedder(bundle: Path, plan: Plan) -> Embedder:
    return Embedder(Runner(Bundle(bundle), plan))


def bundle_with(checkpoint: Path, path: Path, contract: Contract) -> Path:
    export(open_source(checkpoint), path, contract, variants=["fp16"], onnx=False)
    return path


def plain_vectors(
    checkpoint: Path, contract: Contract, prompt: str, texts: Sequence[str]
) -> NDArray[np.float32]:
    """What the contract asks for, by transformers alone: one text at a time, no mask but one."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    model = AutoModel.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    for text in texts:
        instruction = tokenizer(prompt.rstrip(" "), add_special_tokens=False)["input_ids"]
        ids = [BOS, *tokenizer(prompt + text, add_special_tokens=False)["input_ids"]]
        if contract.eos_token_id is not None:
            ids.append(EOS)
        mask = torch.zeros(len(ids), len(ids))
        if contract.is_causal:
            mask = torch.full_like(mask, torch.finfo(torch.float32).min).triu(1)
        with torch.inference_mode():
            hidden = model(
                input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False
            ).last_hidden_state[0]
        pooled = (
            hidden[1 + len(instruction) :].mean(0) if contract.pooling == "mean" else hidden[-1]
        )
        rows.append(pooled.numpy())
    return unit_length(np.stack(rows))


@pytest.fixture(scope="module")
def stand_ins(checkpoint: Path) -> dict[str, Path]:
    """Files of answers of the tiny model, by pooling."""
    files = {}
    for contract in (LAST_TOKEN, MEAN):
        query, document = contract.prompt("query", TASK), contract.prompt("document")
        queries = plain_vectors(checkpoint, contract, query, QUERIES)
        documents = plain_vectors(checkpoint, contract, document, DOCUMENTS)
        scores = (100 * (queries @ documents.T).astype(np.float64)).tolist()
        files[contract.pooling] = checkpoint.parent / f"{contract.pooling}.json"
        files[contract.pooling].write_text(json.dumps(answers_json(scores=scores)))
    return files


@pytest.mark.parametrize("contract", [LAST_TOKEN, MEAN], ids=lambda contract: contract.pooling)
def test_the_right_contract_gives_the_known_answers(
    checkpoint: Path,
    stand_ins: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    contract: Contract,
) -> None:
    bundle = bundle_with(checkpoint, tmp_path / "bundle", contract)
    check(bundle, answers=str(stand_ins[contract.pooling]), **FP32)
    shown = capsys.readouterr().out
    assert "tolerance 0.05 (fp32 over 16-bit weights, printed from fp32)" in shown
    assert [line.split()[-1] for line in shown.splitlines()[4:]] == ["ok"] * 4


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_contract_is_caught(
    checkpoint: Path,
    stand_ins: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    right, change = WRONG[name]
    bundle = bundle_with(checkpoint, tmp_path / "bundle", replace(right, **change))
    with pytest.raises(BundleError, match=r"does not give the scores of .*\.json: query \d and"):
        check(bundle, answers=str(stand_ins[right.pooling]), **FP32)
    assert "differs" in capsys.readouterr().out


def test_the_worst_pair_is_the_one_that_is_named(checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_with(checkpoint, tmp_path / "bundle", LAST_TOKEN)
    model = embedder(bundle, PLAN)
    found = compare(model, ANSWERS, STANDARD).found
    scores = found.copy()
    scores[1, 0] += 0.049
    assert compare(model, replace(ANSWERS, scores=tuple(scores)), STANDARD).agrees
    scores[0, 1] -= 0.051
    compared = compare(model, replace(ANSWERS, scores=tuple(scores)), STANDARD)
    assert not compared.agrees
    assert compared.worst == (0, 1)


# Which answers are taken.


def test_the_model_that_export_recorded_decides(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = known_models()["linq"].contract
    for name in ("linq", "sfr", "e5-mistral"):
        source = open_source(checkpoint)
        export(source, tmp_path / name, contract, model=name, variants=["fp16"], onnx=False)
    for name in ("linq", "sfr"):
        with pytest.raises(BundleError, match=f"does not give the scores of {name}: query"):
            check(tmp_path / name, **FP32)
        assert f"{name}, 100 x cosine: https://huggingface.co/" in capsys.readouterr().out
    check(tmp_path / "e5-mistral", **FP32)
    assert "the card of e5-mistral prints no scores" in capsys.readouterr().out


def test_a_bundle_of_an_unknown_model_needs_answers(checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_with(checkpoint, tmp_path / "bundle", LAST_TOKEN)
    with pytest.raises(
        InputError, match=r"and its contract is no model's: give --answers NAME \(of"
    ):
        check(bundle)
    with pytest.raises(InputError, match=r"takes a JSON file or one of linq, .* 'nonsense' is"):
        check(bundle, answers="nonsense")
    alike = bundle_with(checkpoint, tmp_path / "alike", known_models()["sfr"].contract)
    with pytest.raises(InputError, match="its contract is that of linq, sfr, sfr-2: give"):
        check(alike)


@pytest.mark.weights
@pytest.mark.parametrize("name", built_in())
def test_the_real_model_gives_the_scores_of_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """LOWMEM_WEIGHTS holds a checkpoint for each model that is to be checked, by short name."""
    folder = os.environ.get("LOWMEM_WEIGHTS")
    if folder is None or not (Path(folder) / name).is_dir():
        pytest.skip(f"needs the checkpoint of {name} in the directory $LOWMEM_WEIGHTS/{name}")
    contract = known_models()[name].contract
    source = open_source(Path(folder) / name)
    variants = ["fp16", "int8", "int4"]
    export(source, tmp_path / "bundle", contract, model=name, variants=variants, onnx=False)
    for variant in variants:
        check(tmp_path / "bundle", **FP32 | {"variant": variant})
    assert "differs" not in capsys.readouterr().out
