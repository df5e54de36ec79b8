"""What a source's own files do with tokens, pooling and prompts, beside what the contract says.

Nothing follows it: ids come from the contract, and the variants' tokenizers are rendered from the
contract. But whoever runs the source elsewhere gets other vectors than ours, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain

from tokenizers import Tokenizer

from export.sources.stated import Stated
from lowmem.artifact.contract import Contract
from lowmem.artifact.sentence_transformers_files import POOLING, PROMPTS, settled_prompts
from lowmem.artifact.stock_files import TOKENIZER, TOKENIZER_CONFIG, tokenizer_settings
from lowmem.errors import BundleError


def disagreements(
    stated: Stated, tokenizer_files: Mapping[str, bytes], contract: Contract
) -> Iterator[str]:
    """What whoever runs the source by its own files computes otherwise, a line each.

    Args:
        stated: The source's files for sentence-transformers.
        tokenizer_files: The source's; ``tokenizer.json`` among them has been found valid.
        contract: What is exported.

    Raises:
        BundleError: The tokenizer cannot encode a text.
    """
    if problem := _tokenizer(tokenizer_files, contract):
        yield f"{problem}; the bundle follows its contract, and so do the tokenizers in it"
    if _splits_special_tokens(tokenizer_files):
        yield (
            f"{TOKENIZER_CONFIG} splits special tokens that stand in texts; in the bundle they are "
            "the tokens that they name"
        )
    for problem in chain(_poolings(stated, contract), _prompts(stated, contract)):
        yield f"{problem}; the bundle follows its contract"


def _tokenizer(tokenizer_files: Mapping[str, bytes], contract: Contract) -> str | None:
    """What ``tokenizer.json`` leaves out or adds at the ends of a text, or None where it agrees."""
    pieces = Tokenizer.from_str(tokenizer_files[TOKENIZER].decode())
    pieces.no_truncation()
    pieces.no_padding()
    try:
        bare = pieces.encode("a", add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{TOKENIZER} cannot encode a text: {error}") from error
    try:
        whole = pieces.encode("a").ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tokenizers', which no module has by name
            raise
        return f"the post_processor of {TOKENIZER} contradicts itself"
    before = [] if contract.bos_token_id is None else [contract.bos_token_id]
    behind = [] if contract.eos_token_id is None else [contract.eos_token_id]
    if whole == [*before, *bare, *behind]:
        return None
    problems = []
    if before and whole[:1] != before:
        problems.append(f"no BOS ({contract.bos_token_id}) in front")
    if behind and whole[-1:] != behind:
        problems.append(f"no EOS ({contract.eos_token_id}) behind")
    if not problems:
        return f"{TOKENIZER} adds tokens that the contract has not"
    return f"{TOKENIZER} puts {' and '.join(problems)}"


def _poolings(stated: Stated, contract: Contract) -> Iterator[str]:
    """What a source's ``1_Pooling/config.json`` pools otherwise, if it is there."""
    modes = stated.pooling_modes
    # The mean behind latent attention is one.
    pooling = "mean" if contract.pooling == "latent_attention" else contract.pooling
    if modes not in ((), (pooling,)):
        yield f"{POOLING} pools by {', '.join(modes)}, and the contract by {contract.pooling}"
    elif modes and contract.pooling == "mean" and stated.pools_prompts and contract.has_prompts:
        yield (
            f"{POOLING} takes the mean over prompt and text (include_prompt), and a contract can "
            "only leave the prompt out"
        )


def _prompts(stated: Stated, contract: Contract) -> Iterator[str]:
    """Prompts of queries and documents that the source names, and the contract has otherwise."""
    for name, prompt in settled_prompts(contract).items():
        said = stated.prompts.get(name)
        if name in ("query", "document") and said is not None and said != prompt:
            yield (
                f"{PROMPTS} puts {json.dumps(said)} before a {name}, and the contract "
                f"{json.dumps(prompt)}"
            )


def _splits_special_tokens(tokenizer_files: Mapping[str, bytes]) -> bool:
    file = tokenizer_files.get(TOKENIZER_CONFIG)
    settings = {} if file is None else tokenizer_settings(file, TOKENIZER_CONFIG)
    return settings.get("split_special_tokens") is True
