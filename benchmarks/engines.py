"""Engines that embed side by side, each in a process of its own: ``peers.py`` times them.

Run as a script it is such a process: one JSON object a line in, one a line out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.hardware.peak import MemoryPeak
from lowmem.text.tokenizer import Tokenizer

PEER = "sentence-transformers"

Vectors = NDArray[np.float32]
Encode = Callable[[list[str], list[str]], Vectors]
"""Texts and the prompt before each to unit vectors, ``[texts, hidden_size]``."""
Tokenize = Callable[[list[str], list[str]], list[list[int]]]
"""Texts and the prompt before each to token ids, special tokens included."""


class Engine:
    """One engine in a process of its own.

    Attributes:
        name: What it is called in the record.
        peak: Its memory, sampled as long as it lives.
    """

    def __init__(
        self, name: str, plan: Plan | None, bundle: Path, folder: Path, gguf: Path | None = None
    ) -> None:
        """Starts the process and waits until the model is loaded.

        Args:
            name: What it is called in the record.
            plan: A plan of lowmem's, or None for a peer.
            bundle: The bundle.
            folder: Where vectors may be written.
            gguf: The peer is llama.cpp with this file, not sentence-transformers.

        Raises:
            SystemExit: It did not start.
        """
        self.name = name
        self._vectors = folder / f"{name}.npy"
        job: dict[str, Any] = {"bundle": str(bundle), "plan": plan and asdict(plan)}
        job["gguf"] = gguf and str(gguf)
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak_bytes = 0
        self._answer()

    def run(self, rows: Sequence[Row], prompts: Sequence[str]) -> tuple[float, Vectors]:
        """Seconds for all texts, and their vectors."""
        job = {"texts": [row.text for row in rows], "prompts": list(prompts)}
        answer = self._ask({**job, "vectors": str(self._vectors)})
        return float(answer["seconds"]), np.load(self._vectors)

    def ids(self, rows: Sequence[Row], prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included."""
        job = {"texts": [row.text for row in rows], "prompts": list(prompts)}
        ids: list[list[int]] = self._ask(job)["ids"]
        return ids

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Engines that wait for their turn are not watched: that would take time of the others.
        with MemoryPeak(self._process.pid) as peak:
            line = self._process.stdout.readline()
        self.peak_bytes = max(self.peak_bytes, peak.bytes)
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(job: dict[str, Any]) -> None:
    """The engine's side: one JSON object a line in, one a line out."""
    bundle = Bundle(Path(job["bundle"]))
    threads = hardware.probe().cpu_threads
    if job["gguf"] is not None:
        encode, tokenize = llama_cpp(bundle, Path(job["gguf"]), threads)
    elif job["plan"] is None:
        encode, tokenize = sentence_transformers(bundle.directory("fp16"), threads)
    else:
        encode, tokenize = lowmem(bundle, Plan(**job["plan"]))
    encode(["warm"], [""])
    answer(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        texts, prompts = asked["texts"], asked["prompts"]
        if "vectors" not in asked:
            answer(ids=tokenize(texts, prompts))
            continue
        start = time.perf_counter()
        vectors = encode(texts, prompts)
        seconds = time.perf_counter() - start
        np.save(asked["vectors"], vectors)
        answer(seconds=seconds)


def answer(**values: Any) -> None:
    """Sends one line to the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def sentence_transformers(directory: Path, threads: int) -> tuple[Encode, Tokenize]:
    """The peer, as its documentation loads a model."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})

    def encode(texts: list[str], prompts: list[str]) -> Vectors:
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        vectors: Vectors = model.encode(whole, batch_size=16, show_progress_bar=False)
        return vectors

    def tokenize(texts: list[str], prompts: list[str]) -> list[list[int]]:
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        return [model.tokenize([text])["input_ids"][0].tolist() for text in whole]

    return encode, tokenize


def lowmem(bundle: Bundle, plan: Plan) -> tuple[Encode, Tokenize]:
    """A plan, tokenization included."""
    runner = Runner(bundle, plan)

    def encode(texts: list[str], prompts: list[str]) -> Vectors:
        encoded = runner.tokenizer.encode(texts, prompts, truncate=True)
        return runner.embed(encoded, normalize=True)

    return encode, token_ids(runner.tokenizer)


def llama_cpp(bundle: Bundle, gguf: Path, threads: int) -> tuple[Encode, Tokenize]:
    """llama.cpp, behind the bundle's tokenizer."""
    import llama

    embedder = llama.Embedder(gguf, threads, bundle.contract.max_seq_length)
    tokenizer = tokenizer_of(bundle)

    def encode(texts: list[str], prompts: list[str]) -> Vectors:
        return embedder.embed(tokenizer.encode(texts, prompts, truncate=True))

    return encode, token_ids(tokenizer)


def token_ids(tokenizer: Tokenizer) -> Tokenize:
    """Tokenization without the rest."""

    def tokenize(texts: list[str], prompts: list[str]) -> list[list[int]]:
        encoded = tokenizer.encode(texts, prompts, truncate=True)
        return [text.input_ids.tolist() for text in encoded]

    return tokenize


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """The tokenizer of the 16-bit variant."""
    checkpoint = Checkpoint(bundle.directory("fp16"))
    path = checkpoint.directory / "tokenizer.json"
    return Tokenizer(path, bundle.contract, checkpoint.config.vocab_size)


def llama_files(folder: Path) -> dict[str, Path]:
    """Engine's name to a file of the same weights for llama.cpp; none where it is not installed."""
    if find_spec("llama_cpp") is None:
        return {}
    import llama
    from demo import smollm2

    threads = hardware.probe().cpu_threads
    halves, codes = folder / "F16.gguf", folder / "Q8_0.gguf"
    llama.quantize(smollm2(), halves, "F16", threads)
    llama.quantize(halves, codes, "Q8_0", threads)
    return {"llama.cpp F16": halves, "llama.cpp Q8_0": codes}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
