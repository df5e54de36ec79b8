"""Plans of a tiny bundle on torch, and texts for them."""

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.manifest import Bundle
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.text.batching import EncodedText

Vectors = NDArray[np.float32]


def runner(bundle: Bundle, variant: str = "fp16", compute: str = "fp32", **plan: Any) -> Runner:
    """A variant on torch on one thread, resident unless told otherwise."""
    settings = {"schedule": "resident", "batch_tokens": 4096, "window_tokens": 4096, "threads": 1}
    return Runner(bundle, Plan(variant, "torch", "cpu", compute, **settings | plan))


def encoded(model: Runner) -> list[EncodedText]:
    """Queries and documents of one word and of many, lengths apart and alike, one of them twice."""
    choose = random.Random(0).choice
    words = "the what is a fox question distance and moon of brown at in other ☃ 現在".split()
    texts = [" ".join(choose(words) for _ in range(size)) for size in (1, 1, 1, 2, 3, 3, 8, 8, 20)]
    prompts = [model.contract.prompt("query"), model.contract.prompt("document")]
    both = [prompt for _ in texts for prompt in prompts]
    twice = [text for text in texts for _ in prompts]
    return model.tokenizer.encode([*twice, twice[0]], [*both, both[0]])


def cosine_distances(left: Vectors, right: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows, in float64."""
    product = np.einsum("ij,ij->i", left, right, dtype=np.float64)
    lengths = [np.linalg.norm(side.astype(np.float64), axis=1) for side in (left, right)]
    return 1 - product / (lengths[0] * lengths[1])
