"""The files by which stock sentence-transformers pools and prompts as the contract says.

A contract that it would compute as something else gets no such files: attention that is not causal
has a ``config.json`` that no stock loader takes. A mean that would leave out more or fewer tokens
than ours gets a ``modules.json`` with a pooling that sentence-transformers does not find, for
without the file it makes up its own. One thing cannot be made an error: where a query needs a task
and the contract has no default, its ``encode_query`` puts nothing before a query unless it is given
the ``prompt_name`` of a task; export warns of it. Nor can it of vLLM, which has no such mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from lowmem.artifact import strict_json
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
FILES = (MODULES, POOLING, SETTINGS, PROMPTS)
UNEQUAL_MEAN = "lowmem.MeanBehindPrompts"
"""The type of a pooling that sentence-transformers has not, and so refuses."""
_POOLING_FLAGS = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}


def render(config: ModelConfig, contract: Contract, pieces: Tokenizer) -> dict[str, bytes]:
    """The files, by path within the variant.

    Args:
        config: The model's shape.
        contract: What the files have to say.
        pieces: The model's tokenizer.
    """
    if not contract.is_causal:
        return {}
    if not _leaves_out_the_same(contract, pieces):
        return {MODULES: _json(_modules("sentence_transformers.models.Transformer", UNEQUAL_MEAN))}
    kinds = ["Transformer", "Pooling"]
    if contract.normalize_embeddings:
        kinds.append("Normalize")
    prompts = settled_prompts(contract)
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        # Older releases pool by the mean unless told that they do not.
        **dict.fromkeys(
            (
                "pooling_mode_cls_token",
                "pooling_mode_mean_tokens",
                "pooling_mode_max_tokens",
                "pooling_mode_mean_sqrt_len_tokens",
                "pooling_mode_weightedmean_tokens",
                "pooling_mode_lasttoken",
            ),
            False,
        ),
        _POOLING_FLAGS[contract.pooling]: True,
        "include_prompt": contract.pooling == "lasttoken",
    }
    return {
        MODULES: _json(_modules(*(f"sentence_transformers.models.{kind}" for kind in kinds))),
        # Not sorted: older releases of vLLM take the first key that is true for the pooling mode.
        POOLING: json.dumps(pooling, indent=2).encode() + b"\n",
        SETTINGS: _json({"max_seq_length": contract.max_seq_length, "do_lower_case": False}),
        PROMPTS: _json(
            {
                "prompts": prompts,
                # As in ``Embedder.encode``: a text without a prompt is a document.
                "default_prompt_name": "document" if prompts.get("document") else None,
                "similarity_fn_name": "cosine",
            }
        ),
    }


def settled_prompts(contract: Contract) -> dict[str, str]:
    """Every prompt that the contract settles; a query without a task has none without a default."""
    templates = {"document": contract.document_template, "query": contract.query_template}
    prompts = {
        input_type: contract.prompt(input_type)
        for input_type, template in templates.items()
        if contract.default_task is not None or "{task}" not in template
    }
    if contract.takes_tasks:
        prompts |= {task: contract.prompt("query", task) for task in contract.tasks}
    return prompts


def lacks_query_prompt(files: Mapping[str, bytes]) -> bool:
    """Whether sentence-transformers would embed a query as it stands, for want of a task.

    Args:
        files: What ``render`` gave, others among them.
    """
    return PROMPTS in files and "query" not in json.loads(files[PROMPTS])["prompts"]


def mean_leaves_out_prompts(contract: Contract) -> bool:
    """Whether some of what stock code reads is a prompt that a mean must leave out.

    sentence-transformers does or refuses; vLLM pools the prompt too, or another token alone.
    """
    return contract.is_causal and contract.pooling == "mean" and contract.has_prompts


def _modules(*kinds: str) -> list[dict[str, Any]]:
    """What ``modules.json`` says of modules of these types, the first at the top."""
    return [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind.rpartition('.')[2]}" if index else "",
            "type": kind,
        }
        for index, kind in enumerate(kinds)
    ]


def _leaves_out_the_same(contract: Contract, pieces: Tokenizer) -> bool:
    """Whether sentence-transformers' mean leaves out as many tokens as ours, for every prompt.

    It leaves out what a prompt has when it is tokenized by itself. Ours leaves a space at its end
    to the word behind it (``lowmem.text.tokenizer``). Older releases strip the prompt, and take its
    last token for EOS, whatever it is.
    """
    prompts = [prompt for prompt in settled_prompts(contract).values() if prompt]
    if contract.pooling != "mean" or not prompts:
        return True

    def count(text: str) -> int:
        return len(pieces.encode(text, add_special_tokens=False).ids)

    return contract.eos_token_id is not None and all(
        count(prompt.rstrip(" ")) == count(prompt) == count(prompt.strip()) for prompt in prompts
    )


def _json(value: Any) -> bytes:
    return strict_json.dumps(value).encode()
