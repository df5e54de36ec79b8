"""One plan in one child process: a record of each workload's speed, memory and vectors.

A child of its own gives each engine the machine to itself, shows the true peak of memory, and
turns a crash or a kill by the system into a reason instead of the end of the caller.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.child import Child, serve
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import BundleError
from lowmem.hardware.queueing import Queueing

PACKAGES = (
    "lowmem",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "torch",
    "triton",
)
_ROW_KEYS = tuple(one.name for one in fields(Row))  # a row of a file knows its line besides
_CHILD = "from lowmem.measure import run_child; run_child()"


@dataclass(frozen=True)
class Pass:
    """One call of the engine.

    Attributes:
        rows: Positions of the texts, in the order in which they are given.
        batch_size: Most texts that are computed together, or None for the token budget alone.
    """

    rows: tuple[int, ...]
    batch_size: int | None = None


@dataclass(frozen=True)
class Record:
    """What one run of one plan showed.

    Attributes:
        texts: How many texts were embedded.
        tokens: Their tokens, special tokens and instructions included.
        token_pairs: Pairs of a token and one that it sees, over all texts: attention's work.
        load_seconds: From the start of loading to ready.
        seconds: Each timed pass over all texts, tokenization left out.
        waited_seconds: Of all timed passes, how long arithmetic waited for weights.
        queued_seconds: Of all timed passes, how long threads waited for a core that other processes
            had, summed over them.
        peak_host_bytes: Most RssAnon + RssShmem of the process tree until then.
        peak_device_bytes: Most CUDA memory that torch has held, the context aside; 0 on a CPU, and
            where onnxruntime keeps it.
        versions: Packages that took part.
    """

    texts: int
    tokens: int
    load_seconds: float
    seconds: list[float]
    waited_seconds: float = 0.0
    queued_seconds: float = 0.0
    token_pairs: int = 0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        """Of the timed passes."""
        return float(np.median(self.seconds))

    @property
    def tokens_per_second(self) -> float:
        """Of the median pass."""
        return self.tokens / self.median_seconds

    @property
    def computing_tokens_per_second(self) -> float:
        """Of all passes, had the weights always been there."""
        return self.tokens * len(self.seconds) / max(sum(self.seconds) - self.waited_seconds, 1e-9)


class Measuring:
    """A plan in a process of its own, which runs the workloads it is given, one after another."""

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        """Nothing is started before the first workload.

        Args:
            bundle: The bundle; a variant that was exported anew since it was opened is refused.
            plan: What to run.
        """
        self._plan = {
            "bundle": str(bundle.path),
            "artifact": bundle.artifact_sha256(plan.variant),
            "plan": asdict(plan),
        }
        self._child = Child(_CHILD, plan.id)

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *error: Any) -> None:
        self._child.__exit__(*error)

    def run(
        self,
        rows: Sequence[Row],
        *,
        repeats: int = 1,
        least_seconds: float = 0.0,
        passes: Sequence[Pass] = (),
        warm_up: bool = True,
        vectors: Path | None = None,
        timeout_seconds: float | None = None,
    ) -> Record:
        """Embeds texts; the record's peaks are those of the process until then.

        Args:
            rows: The texts; those over the contract's limit are cut, EOS kept.
            repeats: Timed passes over all texts.
            least_seconds: How long they take together at least: as many follow as are needed.
            passes: What to run in place of them, one after another.
            warm_up: Whether to run the shortest text first, on a card all of them, untimed.
            vectors: Where to write the vectors as ``.npy``, float32 ``[texts, hidden_size]``; of
                several ``passes`` those of each behind those of the one before.
            timeout_seconds: When to give up.

        Raises:
            LowmemError: What the child raised; a crash, a kill or a time-out is a BackendError.
        """
        job = {
            **self._plan,
            "rows": [{name: getattr(row, name) for name in _ROW_KEYS} for row in rows],
            "passes": [asdict(one) for one in passes or [Pass(tuple(range(len(rows))))] * repeats],
            "keeps_all": bool(passes),
            "least_seconds": least_seconds,
            "warm_up": warm_up,
            "vectors": None if vectors is None else str(vectors),
        }
        result = self._child.ask(job, timeout_seconds)
        return Record(**{**result, "peak_host_bytes": self._child.peak_bytes})


def measure(
    bundle: Bundle,
    plan: Plan,
    rows: Sequence[Row],
    *,
    repeats: int = 1,
    least_seconds: float = 0.0,
    warm_up: bool = True,
    vectors: Path | None = None,
    timeout_seconds: float | None = None,
) -> Record:
    """One workload in a child process of its own, as :meth:`Measuring.run` runs it."""
    with Measuring(bundle, plan) as measuring:
        return measuring.run(
            rows,
            repeats=repeats,
            least_seconds=least_seconds,
            warm_up=warm_up,
            vectors=vectors,
            timeout_seconds=timeout_seconds,
        )


def measure_ceiling(bundle: Path, plan: Plan, *, timeout_seconds: float | None = None) -> float:
    """The fastest product of a plan's arithmetic on its device, in a process of its own.

    Args:
        bundle: The bundle.
        plan: Device, compute and threads count, and the shape of its variant.
        timeout_seconds: When to give up.

    Returns:
        Operations per second.

    Raises:
        LowmemError: What the child raised; a crash, a kill or a time-out is a BackendError.
    """
    job = {"bundle": str(bundle), "plan": asdict(plan), "ceiling": True}
    with Child(_CHILD, f"the fastest product in {plan.compute}") as child:
        return float(child.ask(job, timeout_seconds)["operations_per_second"])


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a vector or its speed, as far as installed."""
    # A tenth of the time that importing lowmem takes.
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


class _Loaded:
    """The child's side of :class:`Measuring`: a plan that is ready to run."""

    def __init__(self, job: dict[str, Any]) -> None:
        plan = Plan(**job["plan"])
        start = time.perf_counter()
        bundle = Bundle(Path(job["bundle"]))
        if bundle.artifact_sha256(plan.variant) != job["artifact"]:
            raise BundleError(f"{plan.variant} was exported anew meanwhile ({bundle.path})")
        self._runner = Runner(bundle, plan)
        self._load_seconds = time.perf_counter() - start
        self._is_on_card = plan.device == "cuda"

    def run(self, job: dict[str, Any]) -> Record:
        runner = self._runner
        texts = runner.tokenizer.encode_rows([Row(**row) for row in job["rows"]])
        normalize = runner.contract.normalize_embeddings
        if job["warm_up"] and texts:
            # On a card the kernels are tuned for the shapes that they first meet.
            shortest = min(texts, key=lambda text: len(text.input_ids))
            first = texts if self._is_on_card else [shortest]
            runner.embed(first, normalize=normalize, must_be_finite=False)
        waited_before, queueing = runner.waited_seconds, Queueing()
        seconds: list[float] = []
        embedded: list[NDArray[np.float32]] = []
        for one in itertools.cycle(job["passes"]):
            if len(seconds) >= len(job["passes"]) and sum(seconds) >= job["least_seconds"]:
                break
            given = [texts[row] for row in one["rows"]]
            start = time.perf_counter()
            vectors = runner.embed(
                given, normalize=normalize, batch_size=one["batch_size"], must_be_finite=False
            )
            seconds.append(time.perf_counter() - start)
            embedded = [*embedded, vectors] if job["keeps_all"] else [vectors]
        queued = queueing.seconds()
        if job["vectors"] is not None:
            np.save(job["vectors"], np.concatenate(embedded))
        lengths = [len(text.input_ids) for text in texts]
        is_causal = runner.contract.is_causal
        return Record(
            texts=len(texts),
            tokens=sum(lengths),
            token_pairs=sum(n * (n + 1) // 2 if is_causal else n * n for n in lengths),
            load_seconds=self._load_seconds,
            seconds=seconds,
            waited_seconds=runner.waited_seconds - waited_before,
            queued_seconds=queued,
            peak_device_bytes=runner.peak_device_bytes,
            versions=package_versions(),
        )


def _measure_product(job: dict[str, Any]) -> dict[str, Any]:
    from lowmem.compute.ceiling import best_product  # not in children of onnxruntime plans: torch

    plan = Plan(**job["plan"])
    config = Checkpoint(Bundle(Path(job["bundle"])).directory(plan.variant)).config
    rate = best_product(plan.device, plan.compute, config, plan.threads)
    return {"operations_per_second": rate}


def run_child() -> None:
    """Answers jobs: products of a ceiling, or workloads of the plan that the first one names."""
    loaded: _Loaded | None = None

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        nonlocal loaded
        if "ceiling" in job:
            return _measure_product(job)
        loaded = loaded or _Loaded(job)
        return asdict(loaded.run(job))

    serve(answer)
