"""The table of known models against their cards and code."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as PieceTokenizer

from lowmem.artifact.models import known_models
from lowmem.text.batching import EncodedText
from lowmem.text.tokenizer import Tokenizer
from tests.mistral import mistral_tokenizer

ANSWERS = Path(__file__).parents[2] / "../shared/facts/known_answers.json"
MODELS = known_models()
LAST_TOKEN = ("linq", "e5-mistral", "sfr", "sfr-2")
LATENT = ("nv-embed-v1", "nv-embed-v2")
KOREAN = "최초의 원자력 발전소는 무엇인가?"
TEXTS = ("Who invented Hangul?", KOREAN, "a", " leading", "x</s>", "</s>", "☃ \n\n snow")
VOCAB_SIZE = 32000

Encode = Callable[..., EncodedText]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral")
    for name, content in mistral_tokenizer(legacy=True).items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def encode(folder: Path) -> Encode:
    tokenizers = {
        name: Tokenizer(folder / "tokenizer.json", model.contract, VOCAB_SIZE)
        for name, model in MODELS.items()
    }

    def encode(name: str, text: str, prompt: str = "", *, truncate: bool = False) -> EncodedText:
        (encoded,) = tokenizers[name].encode([text], [prompt], truncate=truncate)
        return encoded

    return encode


@pytest.fixture(scope="module")
def pieces(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = PieceTokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_table_holds_the_seven_models() -> None:
    assert set(MODELS) == {*LAST_TOKEN, "gritlm", *LATENT}
    assert len({model.hub_id for model in MODELS.values()}) == 7
    assert all(name == model.name for name, model in MODELS.items())


def test_a_commit_names_one_model() -> None:
    revisions = [revision for model in MODELS.values() for revision in model.revisions]
    assert len(revisions) == len(set(revisions))
    assert all(len(bytes.fromhex(revision)) == 20 for revision in revisions)


@pytest.mark.parametrize("name", LAST_TOKEN)
def test_the_family_of_e5_is_causal_and_pools_its_eos(name: str) -> None:
    contract = MODELS[name].contract
    assert (contract.is_causal, contract.pooling) == (True, "lasttoken")
    assert (contract.bos_token_id, contract.eos_token_id) == (1, 2)
    assert (contract.max_seq_length, contract.normalize_embeddings) == (4096, True)
    assert contract.prompt("query", "SciFact") == (
        "Instruct: Given a scientific claim, retrieve documents that support or refute the claim\n"
        "Query: "
    )
    assert contract.prompt("query", "") == contract.prompt("document") == ""


def test_gritlm_is_bidirectional_and_has_no_eos() -> None:
    contract = MODELS["gritlm"].contract
    assert (contract.is_causal, contract.pooling) == (False, "mean")
    assert (contract.bos_token_id, contract.eos_token_id) == (1, None)
    assert contract.prompt("query", "Find it") == "<|user|>\nFind it\n<|embed|>\n"
    assert contract.prompt("query", "") == contract.prompt("document") == "<|embed|>\n"


@pytest.mark.parametrize("name", LATENT)
def test_nv_embed_is_bidirectional_and_pools_behind_latent_attention(name: str) -> None:
    contract = MODELS[name].contract
    assert (contract.is_causal, contract.pooling) == (False, "latent_attention")
    assert (contract.bos_token_id, contract.eos_token_id) == (1, 2)
    assert contract.prompt("query", "Find it") == "Instruct: Find it\nQuery: "
    assert contract.prompt("document") == ""


def test_instructions_are_worded_as_mteb_words_them() -> None:
    tasks = MODELS["linq"].contract.tasks
    assert tasks["STSBenchmark"] == tasks["SICK-R"] == "Retrieve semantically similar text."
    assert tasks["NQ"] == "Given a question, retrieve Wikipedia passages that answer the question"
    assert tasks["Banking77Classification"] == (
        "Given a online banking query, find the corresponding intents"
    )
    assert all(set(tasks) <= set(model.contract.tasks) for model in MODELS.values())
    assert MODELS["e5-mistral"].contract.prompt("query", "sts_query") == (
        "Instruct: Retrieve semantically similar text.\nQuery: "
    )


def test_prompts_and_queries_make_the_strings_of_the_cards() -> None:
    if not ANSWERS.exists():
        pytest.skip(f"needs the shared facts, {ANSWERS}")
    cards = json.loads(ANSWERS.read_text())
    assert set(cards) == {model.hub_id for model in MODELS.values()}
    for model in MODELS.values():
        card = cards[model.hub_id]
        prompt = card.get("instruction") or card.get("query_instruction") or card["queries"][0]
        task = prompt.removeprefix("Instruct: ").removeprefix("<|user|>\n").split("\n")[0]
        assert prompt.startswith(model.contract.prompt("query", task))
        assert model.contract.prompt("document") == card.get("document_instruction", "")
        if "max_length" in card:
            assert model.contract.max_seq_length == card["max_length"]


@pytest.mark.parametrize("name", [*LAST_TOKEN, *LATENT])
@pytest.mark.parametrize("text", TEXTS)
def test_eos_is_last_though_the_tokenizer_loses_it(
    encode: Encode, folder: Path, pieces: Callable[[str], list[int]], name: str, text: str
) -> None:
    whole = PieceTokenizer.from_file(str(folder / "tokenizer.json"))
    assert whole.encode("a").ids[-1] != 2
    prompt = MODELS[name].contract.prompt("query", "NQ")
    for before in ("", prompt):
        assert encode(name, text, before).input_ids.tolist() == [1, *pieces(before + text), 2]


@pytest.mark.parametrize("name", [*LAST_TOKEN, "nv-embed-v1"])
def test_eos_is_last_after_truncation(
    encode: Encode, pieces: Callable[[str], list[int]], name: str
) -> None:
    text = "word " * 5000
    prompt = MODELS[name].contract.prompt("query", "NQ")
    encoded = encode(name, text, prompt, truncate=True)
    assert encoded.input_ids.tolist() == [1, *pieces(prompt + text)[:4094], 2]
    assert encoded.cut_tokens == len(pieces(prompt + text)) - 4094


def test_gritlm_texts_end_with_the_text(encode: Encode, pieces: Callable[[str], list[int]]) -> None:
    prompt = MODELS["gritlm"].contract.prompt("document")
    assert encode("gritlm", KOREAN, prompt).input_ids.tolist() == [1, *pieces(prompt + KOREAN)]


@pytest.mark.parametrize("text", ["Who invented Hangul?", KOREAN, "☃"])
def test_gritlm_leaves_bos_and_the_whole_instruction_out_of_its_mean(
    encode: Encode, pieces: Callable[[str], list[int]], text: str
) -> None:
    contract = MODELS["gritlm"].contract
    for prompt in (contract.prompt("document"), contract.prompt("query", "SCIDOCS")):
        # As its code: as many positions as the instruction has ids, BOS among them.
        assert encode("gritlm", text, prompt).pooled_from == 1 + len(pieces(prompt))


@pytest.mark.parametrize("text", ["Who invented Hangul?", KOREAN, "☃"])
def test_nv_embed_leaves_out_as_many_tokens_as_its_instruction_has(
    encode: Encode, pieces: Callable[[str], list[int]], text: str
) -> None:
    prompt = MODELS["nv-embed-v2"].contract.prompt("query", "NQ")
    # As its code: as many positions as the instruction has ids, BOS not counted but left out, so
    # that the space at the end of the instruction is pooled.
    assert encode("nv-embed-v2", text, prompt).pooled_from == len(pieces(prompt))
    assert encode("nv-embed-v2", text).pooled_from == 0


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_do_not_hang_on_the_padding_token(tmp_path: Path, legacy: bool) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(mistral_tokenizer(legacy=legacy)["tokenizer.json"])
    contract = replace(MODELS["linq"].contract, max_seq_length=64)
    expected = Tokenizer(source, contract, VOCAB_SIZE).encode(TEXTS, [""] * len(TEXTS))
    pieces = PieceTokenizer.from_file(str(source))
    pieces.enable_padding(pad_id=2, pad_token="</s>", length=64, direction="left")
    pieces.save(str(source))
    found = Tokenizer(source, contract, VOCAB_SIZE).encode(TEXTS, [""] * len(TEXTS))
    assert [text.input_ids.tolist() for text in found] == [
        text.input_ids.tolist() for text in expected
    ]
