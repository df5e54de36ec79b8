"""One engine, or one peer, in a process of its own: ``python benchmarks/gpu_job.py JOB.json``.

Started by ``gpu.py``; its result is the last line of its standard output.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import CONTRACT

from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import shortest_prefix
from lowmem.compute.plan import Plan
from lowmem.compute.torch_engine import TorchEngine
from lowmem.text.batching import EncodedText, PackedBatch, pack

_QUERY_TOKENS = 16


def texts_of(lengths: list[int], vocab_size: int) -> list[EncodedText]:
    """Random ids between BOS and EOS; BOS is the prefix that all share."""
    random = np.random.default_rng(len(lengths))
    return [
        EncodedText(np.concatenate([[1], random.integers(3, vocab_size, length - 2), [2]]), 1, 1)
        for length in lengths
    ]


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Loads a plan, answers one query, and times every workload."""
    plan = Plan(**job["plan"])
    is_cuda = plan.device == "cuda"
    if job["ceiling_bytes"]:
        total = torch.cuda.get_device_properties(0).total_memory
        # The context is outside of what torch may be held to.
        free, _ = torch.cuda.mem_get_info()
        context = max(0, job["free_bytes"] - free)
        torch.cuda.set_per_process_memory_fraction((job["ceiling_bytes"] - context) / total)
    start = time.perf_counter()
    checkpoint = Checkpoint(Path(job["directory"]))
    engine = TorchEngine(
        checkpoint,
        CONTRACT,
        device=plan.device,
        compute=plan.compute,
        schedule=plan.schedule,
        kept_layers=plan.kept_layers,
        threads=plan.threads,
    )
    synchronize(is_cuda)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "workloads": {}}
    query = texts_of([_QUERY_TOKENS], checkpoint.config.vocab_size)
    # The first compiles kernels, the second is recorded, the others are replayed.
    result["query_seconds"] = [seconds_of(engine, plan, query) for _ in range(2 + job["repeats"])]
    for name, lengths in job["workloads"].items():
        texts = texts_of(lengths, checkpoint.config.vocab_size)
        timed = [seconds_of(engine, plan, texts) for _ in range(1 + job["repeats"])]
        result["workloads"][name] = {"tokens": sum(lengths), "seconds": timed[1:]}
    if job["vectors"]:
        texts = texts_of(job["vectors"]["lengths"], checkpoint.config.vocab_size)
        np.save(job["vectors"]["path"], embed(engine, plan, texts))
    if is_cuda:
        free, _ = torch.cuda.mem_get_info()
        result["device_bytes"] = job["free_bytes"] - free
        result["torch_bytes"] = torch.cuda.max_memory_reserved()
    return result


def embed(engine: TorchEngine, plan: Plan, texts: list[EncodedText]) -> np.ndarray:
    """Vectors in the order of the texts, a window of batches at a time."""
    prefix = shortest_prefix(plan, CONTRACT)
    batches = pack(texts, plan.batch_tokens, shortest_prefix=prefix)
    vectors = np.zeros((len(texts), engine.hidden_size), np.float32)
    for window in windows(batches, plan.window_tokens):
        for batch, part in zip(window, engine.embed(window), strict=True):
            vectors[batch.rows] = part
    return vectors


def windows(batches: list[PackedBatch], tokens: int) -> list[list[PackedBatch]]:
    """Batches that share a reading of the weights."""
    found: list[list[PackedBatch]] = []
    held = 0
    for batch in batches:
        held += batch.tokens
        if held > tokens or not found:
            found.append([])
            held = batch.tokens
        found[-1].append(batch)
    return found


def seconds_of(engine: TorchEngine, plan: Plan, texts: list[EncodedText]) -> float:
    """Vectors come back to the host, so nothing is under way afterwards."""
    start = time.perf_counter()
    embed(engine, plan, texts)
    return time.perf_counter() - start


def run_peer(job: dict[str, Any]) -> dict[str, Any]:
    """transformers, driven as sentence-transformers does: sorted by length, batches padded."""
    from transformers import AutoModel

    device = job["device"]
    model = AutoModel.from_pretrained(job["directory"], dtype=torch.bfloat16).eval().to(device)
    size = job["batch_size"]
    result: dict[str, Any] = {"workloads": {}}
    for name, lengths in job["workloads"].items():
        texts = texts_of(sorted(lengths, reverse=True), model.config.vocab_size)
        timed = []
        for _ in range(1 + job["repeats"]):
            start = time.perf_counter()
            with torch.inference_mode():
                for begin in range(0, len(texts), size):
                    rows = [
                        torch.from_numpy(text.input_ids) for text in texts[begin : begin + size]
                    ]
                    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                    counts = torch.tensor([len(row) for row in rows], device=device)
                    mask = (torch.arange(ids.shape[1], device=device) < counts[:, None]).long()
                    hidden = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                    last = hidden[torch.arange(len(rows), device=device), counts - 1]
                    torch.nn.functional.normalize(last.float(), dim=-1).cpu()
            timed.append(time.perf_counter() - start)
        result["workloads"][name] = {"tokens": sum(lengths), "seconds": timed[1:]}
    return result


def run_peak(job: dict[str, Any]) -> dict[str, Any]:
    """Operations per second of the largest ordinary product, of random values, in bf16."""
    size, device = job["size"], job["device"]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(1 + 3 * job["repeats"]):
        synchronize(device == "cuda")
        start = time.perf_counter()
        for _ in range(job["products"]):
            torch.mm(left, right)
        synchronize(device == "cuda")
        best = min(best, (time.perf_counter() - start) / job["products"])
    return {"operations_per_second": 2 * size**3 / best}


def synchronize(is_cuda: bool) -> None:
    """Waits for the device."""
    if is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    described = json.loads(Path(sys.argv[1]).read_text())
    kinds = {"engine": run_engine, "peer": run_peer, "peak": run_peak}
    with contextlib.redirect_stdout(sys.stderr):
        done = kinds[described["kind"]](described)
    print(json.dumps(done))
