import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, LlamaTokenizerFast

from lowmem.artifact.config import ModelConfig, config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.artifact.stock_files import check, lacks_query_prompt, render
from lowmem.errors import BundleError, InputError
from tests.mistral import SPECIAL_TOKENS, mistral_tokenizer

MESSY = Path(__file__).parents[2] / "../shared/data/messy/texts.jsonl"
TEXTS = [
    "hello world",
    "In 2024, 1234567 people; ١٢٣ ④ ½",
    "Größe, naïve café, e\u0301 ÅÅ",
    "最初の原子力発電所は何ですか？ Who invented 한글?",
    "👩‍👩‍👧 \u200b\u202e zero\u00a0width",
    "def f(x):\n\treturn x ** 2  # code\n\n",
    " leading and trailing ",
    "  two  spaces  ",
    "\n",
    "</s>",
    "a</s>b <s> <unk> <|im_end|> </s",
    "<s> [INST] <<SYS>> Instruct: x\nQuery: ",
    "ﾊﾝｶｸ ｆｕｌｌ ﬁ",
]
CONTRACT = Contract(
    query_template="Instruct: {task}\nQuery: {text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=128,
    normalize_embeddings=True,
    tasks={"NQ": "Given a question, retrieve passages", "STS13": "Retrieve similar text."},
    default_task="NQ",
)
# Its prompts end in no space, so sentence-transformers counts their tokens as we do.
MEAN = replace(CONTRACT, pooling="mean", query_template="Instruct: {task}\nQuery:{text}")
SENTENCE_TRANSFORMERS = {
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
}
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    sliding_window=None,
)
# A few units in the last place of numbers up to 8: padding may change the order of sums.
FLOAT32_NOISE = 2e-6
Files = dict[str, bytes]

# These have no annotations.
load_tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained
llama_config: Callable[..., Any] = LlamaConfig
llama_model: Callable[..., Any] = LlamaModel


def byte_level_tokenizer(*, prefix_space: bool = False, loose: bool = False) -> Files:
    """A small tokenizer with everything that must not survive: truncation, padding, no EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, "he", "Ġt"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=loose, lstrip=loose, rstrip=loose)
            for token in SPECIAL_TOKENS
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"pad_token": "<pad>", "padding_side": "left"}',
    }


SOURCES: dict[str, Callable[[], Files]] = {
    "mistral": lambda: mistral_tokenizer(legacy=True),
    "mistral-not-legacy": lambda: mistral_tokenizer(legacy=False),
    "byte-level": byte_level_tokenizer,
    "byte-level-prefix-space": lambda: byte_level_tokenizer(prefix_space=True),
    "byte-level-loose": lambda: byte_level_tokenizer(loose=True),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Files:
    return SOURCES[request.param]()


@pytest.fixture
def tiny() -> Files:
    return byte_level_tokenizer()


def config_for(source: Files) -> ModelConfig:
    tokenizer = Tokenizer.from_str(source["tokenizer.json"].decode())
    return replace(CONFIG, vocab_size=tokenizer.get_vocab_size(with_added_tokens=True))


def write(directory: Path, files: Mapping[str, bytes], config: ModelConfig = CONFIG) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "config.json").write_text(json.dumps(config_json(config, "float16")))
    return directory


def expected_ids(source: Files, contract: Contract, texts: list[str]) -> list[list[int]]:
    """What the contract says, over the pieces of the source's own tokenizer."""
    tokenizer = Tokenizer.from_str(source["tokenizer.json"].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = [] if contract.bos_token_id is None else [contract.bos_token_id]
    behind = [] if contract.eos_token_id is None else [contract.eos_token_id]
    return [
        [*before, *tokenizer.encode(text, add_special_tokens=False).ids, *behind] for text in texts
    ]


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("eos", [2, None])
def test_stock_ids_are_those_of_the_contract(
    tmp_path: Path, source: Files, bos: int | None, eos: int | None
) -> None:
    contract = replace(CONTRACT, bos_token_id=bos, eos_token_id=eos)
    config = config_for(source)
    directory = write(tmp_path, render(config, contract, source), config)
    stock = load_tokenizer(directory)
    assert stock(TEXTS)["input_ids"] == expected_ids(source, contract, TEXTS)
    assert len(stock) == config.vocab_size


def test_stock_ids_of_messy_texts_are_those_of_the_contract(tmp_path: Path, source: Files) -> None:
    if not MESSY.exists():
        pytest.skip(f"needs the shared texts, {MESSY}")
    texts = [json.loads(line)["text"] for line in MESSY.read_text().splitlines()]
    config = config_for(source)
    files = render(config, replace(CONTRACT, max_seq_length=256), source)
    stock = load_tokenizer(write(tmp_path, files, config))
    assert len(texts) > 500
    assert stock(texts)["input_ids"] == expected_ids(source, CONTRACT, texts)


@pytest.mark.parametrize(("bos", "eos"), [(1, 2), (1, None), (None, 2)])
def test_a_class_that_follows_the_flags_gives_the_same_ids(
    tmp_path: Path, bos: int | None, eos: int | None
) -> None:
    source = mistral_tokenizer(legacy=True)
    contract = replace(CONTRACT, bos_token_id=bos, eos_token_id=eos)
    directory = write(tmp_path, render(config_for(source), contract, source))
    stock = LlamaTokenizerFast.from_pretrained(directory)
    assert stock(TEXTS)["input_ids"] == expected_ids(source, contract, TEXTS)


def test_the_post_processor_alone_gives_the_same_ids(source: Files) -> None:
    files = render(config_for(source), CONTRACT, source)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert ids == expected_ids(source, CONTRACT, TEXTS)


def test_a_truncated_text_keeps_its_eos(tmp_path: Path, source: Files) -> None:
    config = config_for(source)
    stock = load_tokenizer(write(tmp_path, render(config, CONTRACT, source), config))
    text = "word " * 200
    ids = stock(text, truncation=True)["input_ids"]
    [whole] = expected_ids(source, CONTRACT, [text])
    assert ids == [*whole[:127], 2]


def test_a_batch_is_padded_behind_its_texts(tmp_path: Path, tiny: Files) -> None:
    stock = load_tokenizer(write(tmp_path, render(CONFIG, CONTRACT, tiny)))
    batch = stock(["he", "hehehe"], padding=True)
    assert batch["input_ids"][0] == [1, stock.convert_tokens_to_ids("he"), 2, 3, 3]
    assert batch["attention_mask"][0] == [1, 1, 1, 0, 0]
    assert batch.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("settings", "eos", "pad"),
    [
        (b'{"pad_token": "<pad>"}', 2, "<pad>"),
        (b'{"pad_token": {"content": "<pad>", "lstrip": false}}', 2, "<pad>"),
        (b'{"pad_token": "[PAD]"}', 2, "</s>"),
        (b'{"pad_token": "he"}', 2, "</s>"),
        (b'{"pad_token": null}', 2, "</s>"),
        (b"{}", None, "<s>"),
    ],
)
def test_padding_is_a_special_token_that_exists(
    tiny: Files, settings: bytes, eos: int | None, pad: str
) -> None:
    contract = replace(CONTRACT, eos_token_id=eos)
    files = render(CONFIG, contract, tiny | {"tokenizer_config.json": settings})
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == pad


def test_padding_is_found_in_the_special_tokens_map(tiny: Files) -> None:
    tiny.pop("tokenizer_config.json")
    files = render(CONFIG, CONTRACT, tiny | {"special_tokens_map.json": b'{"pad_token": "<pad>"}'})
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<pad>"
    assert "special_tokens_map.json" not in files


def test_rendering_what_was_rendered_changes_no_byte(tmp_path: Path, source: Files) -> None:
    config = config_for(source)
    files = render(config, CONTRACT, source)
    assert render(config, CONTRACT, files) == files
    check(write(tmp_path, files), config, CONTRACT)


def test_nothing_else_of_the_tokenizer_changes(source: Files) -> None:
    before = json.loads(source["tokenizer.json"])
    after = json.loads(render(config_for(source), CONTRACT, source)["tokenizer.json"])
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"post_processor", "truncation", "padding"}
    assert after["truncation"] is after["padding"] is None
    assert list(after) == list(before)


def test_a_tokenizer_must_be_tokenizer_json(tiny: Files) -> None:
    with pytest.raises(
        InputError, match=r"must come as tokenizer\.json, got \['tokenizer\.model'\]"
    ):
        render(CONFIG, CONTRACT, {"tokenizer.model": b""})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", "tokenizer.json must hold a JSON object, got an array"),
        (b"{", "tokenizer.json is not JSON"),
        (b'{"version": "1.0"}', "tokenizer.json is not a tokenizer"),
        (
            b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
            "no",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        render(CONFIG, CONTRACT, {"tokenizer.json": data})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bos_token_id": 7}, "bos_token_id must be one of .* got 7, the ordinary piece '\\$'"),
        ({"eos_token_id": 310}, "eos_token_id must be one of .* got 310, no token at all"),
        ({"max_seq_length": 257}, "max_seq_length must be at most the model's 256, got 257"),
    ],
)
def test_a_contract_that_the_model_cannot_keep_is_refused(
    tiny: Files, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        render(CONFIG, replace(CONTRACT, **change), tiny)


def test_ids_outside_the_embedding_are_refused(tiny: Files) -> None:
    with pytest.raises(InputError, match=r"must be below vocab_size=261, got 261 for 'Ġt'"):
        render(replace(CONFIG, vocab_size=261), CONTRACT, tiny)


def test_prompts_are_those_of_the_contract(tiny: Files) -> None:
    def settings(**change: Any) -> Any:
        files = render(CONFIG, replace(CONTRACT, **change), tiny)
        return json.loads(files["config_sentence_transformers.json"])

    query = "Instruct: Given a question, retrieve passages\nQuery: "
    tasks = {"NQ": query, "STS13": "Instruct: Retrieve similar text.\nQuery: "}
    assert settings() == {
        "prompts": {"document": "", "query": query, **tasks},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    assert settings(default_task=None)["prompts"] == {"document": "", **tasks}
    assert settings(query_template="query: {text}", tasks={}, default_task=None)["prompts"] == {
        "document": "",
        "query": "query: ",
    }
    assert settings(document_template="passage: {text}")["default_prompt_name"] == "document"


def test_a_query_without_a_prompt_is_one_that_needs_a_task(tiny: Files) -> None:
    def lacks(**change: Any) -> bool:
        return lacks_query_prompt(render(CONFIG, replace(CONTRACT, **change), tiny))

    assert lacks(default_task=None)
    assert not lacks()
    assert not lacks(default_task=None, query_template="query: {text}")
    assert not lacks(default_task=None, is_causal=False)  # nothing is there to be loaded


@pytest.mark.parametrize("contract", [CONTRACT, MEAN])
def test_the_first_key_that_is_true_is_the_pooling_mode(tiny: Files, contract: Contract) -> None:
    """As older releases of vLLM read it."""
    settings = json.loads(render(CONFIG, contract, tiny)["1_Pooling/config.json"])
    first = next(key for key, value in settings.items() if value is True)
    flags = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
    assert first == flags[contract.pooling]
    assert list(settings)[-1] == "include_prompt"


def test_files_with_sorted_keys_still_fit_their_contract(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    path = directory / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    check(directory, CONFIG, CONTRACT)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"query_template": "query:{text}", "tasks": {}, "default_task": None},
        {"query_template": "{text}", "eos_token_id": None, "tasks": {}, "default_task": None},
        {"query_template": "{task} {text}", "tasks": {}, "default_task": None},
    ],
)
def test_a_mean_over_the_same_tokens_gets_all_files(
    tmp_path: Path, tiny: Files, change: dict[str, Any]
) -> None:
    contract = replace(MEAN, **change)
    files = render(CONFIG, contract, tiny)
    assert files.keys() > SENTENCE_TRANSFORMERS
    check(write(tmp_path, files), CONFIG, contract)


@pytest.mark.parametrize(
    "change",
    [
        {"query_template": "Instruct: {task}\nQuery: {text}"},
        {"document_template": "passage: {text}"},
        {"query_template": "Instruct: {task} {text}", "default_task": None},
        {"query_template": "Instruct: {task}\n{text}"},  # older releases strip it
        {"eos_token_id": None},  # older releases take one token off
    ],
)
def test_a_mean_over_other_tokens_gets_the_tokenizer_alone(
    tmp_path: Path, tiny: Files, change: dict[str, Any]
) -> None:
    contract = replace(MEAN, **change)
    files = render(CONFIG, contract, tiny)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    check(write(tmp_path, files), CONFIG, contract)
    assert render(CONFIG, replace(contract, pooling="lasttoken"), tiny).keys() > files.keys()


def test_sentence_transformers_files_beside_another_mean_are_refused(
    tmp_path: Path, tiny: Files
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(
        BundleError, match=r"modules\.json must not be there: .* take the mean over"
    ):
        check(directory, CONFIG, replace(CONTRACT, pooling="mean"))


def test_attention_that_stock_code_cannot_compute_gets_the_tokenizer_alone(tiny: Files) -> None:
    files = render(CONFIG, replace(CONTRACT, is_causal=False), tiny)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "mean", "query_template": MEAN.query_template},
        {"is_causal": False},
    ],
)
@pytest.mark.parametrize("eos", [2, None])
def test_what_was_rendered_fits_its_contract(
    tmp_path: Path, tiny: Files, change: dict[str, Any], eos: int | None
) -> None:
    contract = replace(CONTRACT, eos_token_id=eos, **change)
    config = replace(CONFIG, is_stock=contract.is_causal)
    check(write(tmp_path, render(config, contract, tiny), config), config, contract)


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value))

    return apply


def lose_eos(value: Any) -> None:
    value["post_processor"]["single"].pop()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (edit("tokenizer.json", lose_eos), "tokenizer.json has a post_processor that does not"),
        (
            edit("tokenizer.json", lambda value: value.pop("post_processor")),
            "tokenizer.json lacks post_processor=",
        ),
        (
            edit("tokenizer.json", lambda value: value.update(truncation={"max_length": 9})),
            "tokenizer.json",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(add_eos_token=False)),
            "tokenizer_config.json must have add_eos_token=true, got false",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.pop("add_bos_token")),
            "tokenizer_config.json lacks add_bos_token=true",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(tokenizer_class="Llama")),
            'must have tokenizer_class="PreTrainedTokenizerFast", got "Llama"',
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(split_special_tokens=True)),
            "tokenizer_config.json must not have split_special_tokens=true",
        ),
        (
            edit("1_Pooling/config.json", lambda value: value.update(pooling_mode_lasttoken=False)),
            "1_Pooling/config.json must have pooling_mode_lasttoken=true, got false",
        ),
        (
            edit("1_Pooling/config.json", lambda value: value.update(word_embedding_dimension=9)),
            "1_Pooling/config.json must have word_embedding_dimension=32, got 9",
        ),
        (edit("modules.json", lambda value: value.pop()), r"modules.json must be \[.*, got \["),
        (
            edit("sentence_bert_config.json", lambda value: value.update(max_seq_length=512)),
            "sentence_bert_config.json must have max_seq_length=128, got 512",
        ),
        (
            edit("config_sentence_transformers.json", lambda value: value["prompts"].pop("query")),
            "config_sentence_transformers.json must have prompts=",
        ),
        (lambda directory: (directory / "modules.json").unlink(), "modules.json is missing"),
        (
            lambda directory: (directory / "modules.json").write_text("[1"),
            "modules.json is not JSON",
        ),
        (
            lambda directory: (directory / "tokenizer.json").write_text("[]"),
            "tokenizer.json must hold a JSON object",
        ),
        (
            lambda directory: (directory / "tokenizer_config.json").unlink(),
            "tokenizer_config.json cannot be read: No such file",
        ),
    ],
)
def test_a_file_that_disagrees_with_the_contract_is_named(
    tmp_path: Path, tiny: Files, damage: Callable[[Path], object], problem: str
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    damage(directory)
    with pytest.raises(BundleError, match=problem) as caught:
        check(directory, CONFIG, CONTRACT)
    assert "\n" not in str(caught.value)


def test_every_disagreement_is_listed_at_once(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, replace(MEAN, pooling="lasttoken"), tiny))
    changed = replace(MEAN, bos_token_id=None, max_seq_length=64, normalize_embeddings=False)
    with pytest.raises(BundleError) as caught:
        check(directory, CONFIG, changed)
    for problem in (
        "tokenizer.json has a post_processor that does not add the contract's BOS and EOS",
        "tokenizer_config.json must have add_bos_token=false, got true",
        "tokenizer_config.json must have model_max_length=64, got 128",
        "modules.json must be",
        "1_Pooling/config.json must have include_prompt=false, got true",
        "1_Pooling/config.json must have pooling_mode_mean_tokens=true, got false",
        "sentence_bert_config.json must have max_seq_length=64, got 128",
    ):
        assert problem in str(caught.value)


def test_a_contract_of_another_tokenizer_is_refused(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(BundleError, match="does not fit its contract: eos_token_id must be one of"):
        check(directory, CONFIG, replace(CONTRACT, eos_token_id=9))


def test_sentence_transformers_files_beside_other_attention_are_refused(
    tmp_path: Path, tiny: Files
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(BundleError, match=r"modules\.json must not be there: stock code would"):
        check(directory, CONFIG, replace(CONTRACT, is_causal=False))


@pytest.mark.parametrize(
    ("is_stock", "problem"),
    [
        (True, "config.json must have a model_type that stock code refuses"),
        (False, "config.json has the model_type of bidirectional attention"),
    ],
)
def test_a_model_type_of_other_attention_is_refused(
    tmp_path: Path, tiny: Files, is_stock: bool, problem: str
) -> None:
    contract, config = replace(CONTRACT, is_causal=not is_stock), replace(CONFIG, is_stock=is_stock)
    directory = write(tmp_path, render(config, contract, tiny), config)
    with pytest.raises(BundleError, match=problem):
        check(directory, config, contract)


def test_latent_attention_needs_a_model_that_has_its_weights(tiny: Files) -> None:
    pooled = replace(CONTRACT, is_causal=False, pooling="latent_attention")
    with pytest.raises(InputError, match="got latent_attention and a model with no weights for it"):
        render(CONFIG, pooled, tiny)
    latents = replace(CONFIG, is_stock=False, latent_attention=LatentAttentionConfig(8, 2, 16))
    assert render(latents, pooled, tiny).keys() == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(InputError, match="got mean and a model with weights for it"):
        render(latents, replace(pooled, pooling="mean"), tiny)


@pytest.mark.parametrize("contract", [CONTRACT, MEAN])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_gives_the_vectors_of_the_contract(
    tmp_path: Path, tiny: Files, contract: Contract, normalize: bool
) -> None:
    contract = replace(contract, normalize_embeddings=normalize)
    torch.manual_seed(0)
    model = llama_model(llama_config(**config_json(CONFIG, "float32"))).eval()
    model.save_pretrained(tmp_path)
    write(tmp_path, render(CONFIG, contract, tiny))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert stock.max_seq_length == 128

    def expected(prompt: str, text: str) -> np.ndarray[Any, Any]:
        [ids] = expected_ids(tiny, contract, [prompt + text])
        [prompt_ids] = expected_ids(tiny, contract, [prompt])
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        first = len(prompt_ids) - 1 if prompt else 0  # BOS and the prompt, without its EOS
        vector = hidden[-1] if contract.pooling == "lasttoken" else hidden[first:].mean(0)
        vector = vector / vector.norm() if normalize else vector
        return np.asarray(vector.numpy())

    texts = ["he", "the distance between the earth and the moon is 384400 km"]
    for prompt, vectors in (
        (contract.prompt("query"), stock.encode_query(texts)),
        (contract.prompt("query", "STS13"), stock.encode(texts, prompt_name="STS13")),
        ("", stock.encode_document(texts)),
        ("", stock.encode(texts)),
    ):
        for text, vector in zip(texts, np.asarray(vectors), strict=True):
            np.testing.assert_allclose(vector, expected(prompt, text), rtol=0, atol=FLOAT32_NOISE)
