"""Reports with invented figures, and the pages that show them."""

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowmem.artifact.verdict import FLOORS
from lowmem.fidelity import metrics
from lowmem.fidelity.html import ReportContext, render

STANDARD = FLOORS["standard"]
CONTEXT = ReportContext(
    model="Linq-AI-Research/Linq-Embed-Mistral",
    licence="cc-by-nc-4.0",
    source_sha256="e" * 64,
    machine="AMD EPYC 9R14, 8 threads",
    texts="probe",
    versions={"lowmem": "0.1.0", "numpy": "2.3.5"},
    floor=STANDARD,
)
TEXTS = 200
TOKENS = [3 + 7 * index for index in range(TEXTS)]
GOOD, FAIR, BAD = 2e-4, 5e-3, 6e-2  # mean distances from the reference


def cosines_of(distance: float) -> list[float]:
    """Cosines of all texts, with a mean distance from the reference."""
    spread = np.random.default_rng(7).gamma(8, 1 / 8, TEXTS)
    return [float(value) for value in 1 - distance * spread]


def worst_text(place: int, cosines: Any) -> dict[str, Any]:
    return {
        "id": f"text-{place}",
        "cosine": float(cosines[place]),
        "tokens": TOKENS[place],
        "input_type": "document",
        "text": f"It was text {place}, and it went on for a while about nothing in particular.",
        "kept": 6,
        "of": 10,
        "nearest_before": {"id": "text-1", "text": "What stood nearest before"},
        "nearest_now": {"id": f"text-{place % 2}", "text": "What stands nearest now"},
    }


def judged(reference: float, difference: float, spread: float = 0.01) -> dict[str, Any]:
    return {
        "reference": reference,
        "plan": reference + difference,
        "difference": difference,
        "interval": [difference - spread, difference + spread],
    }


RETRIEVAL = {
    "name": "cranfield",
    "documents": 200,
    "all_documents": 1398,
    "blank_documents": 2,
    "queries": 25,
    "figures": {
        "ndcg@10": judged(0.42, -0.05),
        "recall@10": judged(0.5, 0.0),
        "recall@100": judged(0.7, 0.0),
        "mrr@10": judged(0.4, -0.02),
    },
}
STS = {"name": "pairs.jsonl", "pairs": 100, "spearman": judged(0.8, -0.004)}


def report(plan: str, distance: float, *, speed: float | None = 100.0, **changes: Any) -> Any:
    """A plan's report, as ``report --json`` has it; ``changes`` take the place of its keys."""
    cosines = np.array(cosines_of(distance))
    return {
        "format": 1,
        "plan": plan,
        "artifact_sha256": "a" * 64,
        "reference_sha256": "d" * 64,
        "texts": {"name": "probe", "sha256": "c" * 64, "count": TEXTS, "tokens": sum(TOKENS)},
        "cosine": metrics.summary(cosines),
        "buckets": metrics.buckets(
            cosines,
            tokens=TOKENS,
            languages=["en", "de"] * (TEXTS // 2),
            input_types=["document"] * TEXTS,
        ),
        "overlap": {"1": 0.9, "10": 0.85},
        "search": {"queries": 20, "documents": 180, "overlap": {"1": 0.95, "10": 0.91}},
        "spearman": 0.97,
        "invariance": {"texts": 6, "alone": 2e-13, "shuffled": 0.0, "neighbours": 1e-13},
        "outputs": [
            {"name": name, "vector_bytes": size, "overlap": {"1": 0.9, "10": share}}
            for name, size, share in (("float32", 16384, 0.85), ("binary", 512, 0.61))
        ],
        "calibration": {"texts": "none", "shared": None},
        "worst": [worst_text(int(place), cosines) for place in np.argsort(cosines)[:10]],
        "nonfinite": 0,
        "norm_error": 1e-7,
        "bytes": 4 * 2**30,
        "bits_per_weight": {"linears": 4.25, "model": 4.5},
        "tokens_per_second": speed,
        "retrieval": None,
        "sts": None,
        "floor": STANDARD.to_json(),
        "verdict": "pass",
        **changes,
    }


def page_of(
    reports: Sequence[Any], context: ReportContext = CONTEXT, *, drawn: bool = False
) -> str:
    """The page of some reports, with the pictures of each text's cosine if ``drawn``."""
    distances = {one["plan"]: one["cosine"]["mean"] for one in reports}
    cosines = {plan: cosines_of(1 - mean) for plan, mean in distances.items()} if drawn else {}
    return render(reports, cosines, TOKENS, context)


def words(page: str) -> str:
    """The page's text on one line, without its head."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


FOUR = [
    report("int8-torch-cpu-int8", FAIR, speed=300.0),
    report("fp16-torch-cpu-bf16", GOOD, speed=100.0, bytes=14 * 2**30),
    report("int4-torch-cpu-fp32", BAD, speed=50.0),
    report("int4-onnxruntime-cpu-int8", BAD, speed=400.0),
]
