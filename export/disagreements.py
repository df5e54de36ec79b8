"""What a source's own files do with BOS, EOS and pooling, beside what the contract says.

Nothing follows it: ids come from the contract, and the variants' tokenizers are rendered from the
contract. But whoever runs the source elsewhere gets other vectors than ours, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer

from export.sources import Source
from export.sources.huggingface import POOLING
from lowmem.artifact.contract import Contract
from lowmem.artifact.stock_files import TOKENIZER


def tokenizer_disagreement(tokenizer_files: Mapping[str, bytes], contract: Contract) -> str | None:
    """What ``tokenizer.json`` loses or adds at the ends of a text, or None where it agrees.

    Args:
        tokenizer_files: The source's; ``tokenizer.json`` among them has been found valid.
        contract: What ought to stand there.
    """
    pieces = Tokenizer.from_str(tokenizer_files[TOKENIZER].decode())
    pieces.no_truncation()
    pieces.no_padding()
    bare = pieces.encode("a", add_special_tokens=False).ids
    whole = pieces.encode("a").ids
    before = [] if contract.bos_token_id is None else [contract.bos_token_id]
    behind = [] if contract.eos_token_id is None else [contract.eos_token_id]
    if whole == [*before, *bare, *behind]:
        return None
    problems = []
    if before and whole[:1] != before:
        problems.append(f"loses BOS ({contract.bos_token_id})")
    if behind and whole[-1:] != behind:
        problems.append(f"loses EOS ({contract.eos_token_id})")
    return f"{TOKENIZER} " + (" and ".join(problems) or "adds tokens that the contract has not")


def pooling_disagreement(source: Source, contract: Contract) -> str | None:
    """What a source's ``1_Pooling/config.json`` pools by, or None where it agrees or is not there.

    Args:
        source: The checkpoint.
        contract: What it ought to pool by; the mean behind latent attention is one.
    """
    modes = source.pooling_modes
    pooling = "mean" if contract.pooling == "latent_attention" else contract.pooling
    if modes in ((), (pooling,)):
        return None
    return f"{POOLING} pools by {', '.join(modes)}, and the contract by {contract.pooling}"
