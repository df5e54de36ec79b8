"""What each step of quantization is worth: ``python benchmarks/quantizers.py [DIR]``.

Every step quantizes SmolLM2 in a process of its own, and its vectors of the ``probe`` texts, and
their ten nearest others, are compared with those of the 16-bit weights: all in float32, but for
variants whose compute is 8 bits. A step that leaves something out, or does it in another way,
replaces one function of the export.

llama.cpp quantizes the same 16-bit weights with its own quantizer (``pip install
llama-cpp-python``); token embeddings stay in 16 bits, as they do here. What it stored is widened by
``gguf`` and run by the same decoder, so that nothing but the quantization differs.

What DIR/measured.json already holds is not measured again. Once nothing is missing, the record
``benchmarks/results/quantizers.json`` and the picture beside it are written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from demo import CONTRACT, smollm2
from numpy.typing import NDArray
from record import RESULTS, ROOT, head, measure_missing, resume, write

import export.calibration
import export.folds
import export.quantizers.gptq as gptq
import export.sensitivities
import lowmem.artifact.variants
from export.hidden_states import Stage, Texts
from export.pipeline import export as run_export
from export.sources import open_source
from lowmem import data, hardware
from lowmem.artifact.contract import Contract, read_contract
from lowmem.artifact.formats import IntGrouped
from lowmem.artifact.manifest import Bundle
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.fidelity import metrics, neighbours
from lowmem.fidelity.report import NEIGHBOURS

NAME = "quantizers"
_SMALL_RIDGE = 1e-3
"""Of each input's own; it is doubled where float32 does not suffice, as ever."""
TEXTS = "probe"
LLAMA_TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")

Measured = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One way to quantize.

    Attributes:
        about: What is done, for the table.
        variant: What is written.
        change: Replaces what the step does otherwise, in a process of its own.
        texts: Of how many calibration texts one is taken; 0 for none of them.
        compute: Arithmetic that is measured.
    """

    about: str
    variant: str
    change: Callable[[], None] = lambda: None
    texts: int = 1
    compute: str = "fp32"


def without_least_squares() -> None:
    """Weights stay where they are before they are rounded."""
    gptq.least_squares = lambda weight, missing, inverse: weight


def _counted(weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Tokens count by their hidden states and by whether they are pooled, and by nothing else."""

    def weights(
        self: export.calibration.Calibration, index: int, stage: Stage, texts: Texts
    ) -> Iterator[torch.Tensor]:
        for batch in texts.batches:
            yield weigh(self.states()[batch.rows], batch.pooling_mask)[:, None]

    # A step is left out, so a method is replaced.
    export.calibration.Calibration._token_weights = weights  # type: ignore[method-assign]
    export.sensitivities.token_sensitivities = lambda *_: torch.empty(0)


def with_absolute_errors() -> None:
    """Tokens count by the squared error of their states, however long those are."""
    _counted(lambda states, pooled: torch.ones(len(states)))


def with_equal_tokens() -> None:
    """Tokens count by their error relative to their states."""
    _counted(lambda states, pooled: 1 / states.square().mean(dim=-1))


def with_pooled_tokens() -> None:
    """The same, and those that are pooled four times as much as others."""
    _counted(lambda states, pooled: (1.0 + 3.0 * pooled) / states.square().mean(dim=-1))


def with_one_ridge() -> None:
    """The ridge is a part of the mean moment, the same for all inputs."""
    inverse = gptq.ridge_inverse

    def of_the_mean(inputs: torch.Tensor, ridge: float = gptq.RIDGE) -> torch.Tensor:
        regular = inputs.clone()
        regular.diagonal().add_(inputs.diagonal().mean(), alpha=ridge)
        return inverse(regular, _SMALL_RIDGE)

    gptq.ridge_inverse = of_the_mean


def without_first_tokens() -> None:
    """The first token of a text, whose states are the longest of all, counts nothing."""
    weights = export.calibration.Calibration._token_weights

    def without(
        self: export.calibration.Calibration, index: int, stage: Stage, texts: Texts
    ) -> Iterator[torch.Tensor]:
        counted = weights(self, index, stage, texts)
        for batch, weight in zip(texts.batches, counted, strict=True):
            starts = batch.spans.last_tokens + 1 - torch.tensor(batch.lengths)
            weight[starts] = 0
            yield weight

    # As above.
    export.calibration.Calibration._token_weights = without  # type: ignore[method-assign]


def with_plain_sensitivities() -> None:
    """Tokens count by their sensitivities as they are."""
    export.calibration.SENSITIVITY_POWER = 1.0


def with_larger_groups() -> None:
    """A scale for 64 weights."""
    lowmem.artifact.variants.LOW = IntGrouped(bits=4, group_size=64)


def with_smoothquant() -> None:
    """Scales of the folds are those of SmoothQuant's formula."""
    export.folds._STEPS = 1


def with_gptq_alone() -> None:
    """Without least squares, by absolute errors, with one ridge."""
    without_least_squares()
    with_absolute_errors()
    with_one_ridge()


def with_plain_least_squares() -> None:
    """Least squares as they are found in books."""
    with_absolute_errors()
    with_one_ridge()


def with_relative_errors() -> None:
    """With one ridge, and with all tokens alike."""
    with_one_ridge()
    with_equal_tokens()


STEPS = {
    "int4, data-free": Step("weights alone, scales by squared error", "int4", texts=0),
    "int4, gptq": Step("GPTQ", "int4", with_gptq_alone),
    "int4, least squares": Step(
        "and weights moved by least squares to full-precision outputs",
        "int4",
        with_plain_least_squares,
    ),
    "int4, relative errors": Step(
        "and each token's error relative to its states", "int4", with_relative_errors
    ),
    "int4, ridges": Step("and a ridge of each input's own", "int4", with_equal_tokens),
    "int4, pooled tokens": Step("and pooled tokens count four times", "int4", with_pooled_tokens),
    "int4": Step("instead, tokens count by what they do to the vector: what is exported", "int4"),
    "int4, plain sensitivities": Step(
        "the same, by the square of that", "int4", with_plain_sensitivities
    ),
    "int4, no first token": Step("the same, first tokens left out", "int4", without_first_tokens),
    "int4, half the texts": Step("the same, with every second text", "int4", texts=2),
    "int4, groups of 64": Step("the same, in groups of 64", "int4", with_larger_groups),
    "int4-5.5": Step("some stages in 8 bits, by pooled effect", "int4-5.5"),
    "bnb-nf4, data-free": Step("weights alone", "bnb-nf4", texts=0),
    "bnb-nf4": Step("calibrated", "bnb-nf4"),
    "int8, data-free": Step("weights alone", "int8", texts=0, compute="int8"),
    "int8, SmoothQuant": Step(
        "calibrated, with folds by SmoothQuant's formula", "int8", with_smoothquant, compute="int8"
    ),
    "int8": Step("calibrated, with balanced folds: what is exported", "int8", compute="int8"),
    "bnb-int8, data-free": Step("weights alone", "bnb-int8", texts=0),
    "bnb-int8": Step("calibrated", "bnb-int8"),
}


class Site:
    """Where everything is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fp16 = directory / "fp16"

    def clear(self) -> None:
        """Removes what another commit may have made: an export would keep it."""
        for made in (self.fp16, self.directory / "bundles"):
            shutil.rmtree(made, ignore_errors=True)
        (self.directory / "reference.npy").unlink(missing_ok=True)

    def prepare(self) -> None:
        """The 16-bit weights and their vectors."""
        if not (self.directory / "reference.npy").exists():
            run_export(open_source(smollm2()), self.fp16, contract(), variants=["fp16"], onnx=False)
            np.save(self.directory / "reference.npy", embed(self.fp16, "fp16", "fp32"))

    def in_a_process(self, name: str) -> Measured:
        """One step or type, in a process of its own."""
        command = [sys.executable, __file__, str(self.directory), "--step", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured: Measured = json.loads(done.stdout.splitlines()[-1])
        return measured

    def measure(self, name: str) -> Measured:
        """One step, in this process, which it leaves changed."""
        step = STEPS[name]
        step.change()
        rows: Sequence[Row] = data.load("calibration")[:: step.texts] if step.texts else ()
        bundle = self.directory / "bundles" / name.replace(", ", "-").replace(" ", "-")
        run_export(
            open_source(smollm2()),
            bundle,
            contract(),
            variants=[step.variant],
            calibration=rows,
            onnx=False,
        )
        bits = Bundle(bundle).variant(step.variant).bits_per_weight["linears"]
        about = {"about": step.about, "variant": step.variant, "compute": step.compute}
        vectors = embed(bundle, step.variant, step.compute)
        return about | {"bits": bits} | self._fidelity(vectors)

    def measure_llama(self, name: str) -> Measured:
        """One of llama.cpp's types."""
        import llama

        threads = hardware.probe().cpu_threads
        halves, path = self.directory / "F16.gguf", self.directory / f"{name}.gguf"
        if not halves.exists():
            llama.quantize(smollm2(), halves, "F16", threads)
        llama.quantize(halves, path, name, threads)
        linears = [
            tensor
            for tensor in gguf.GGUFReader(path).tensors
            if tensor.name.startswith("blk.") and "norm" not in tensor.name
        ]
        weights = sum(int(tensor.n_elements) for tensor in linears)
        bits = 8 * sum(int(tensor.n_bytes) for tensor in linears) / weights
        bundle = self.directory / "bundles" / name
        run_export(open_source(path), bundle, contract(), variants=["fp16"], onnx=False)
        about = {"about": f"llama.cpp {name}", "bits": round(bits, 4)}
        return about | self._fidelity(embed(bundle, "fp16", "fp32"))

    def _fidelity(self, vectors: NDArray[np.float32]) -> Measured:
        """Cosines to the reference, and how many of the ten nearest texts stay."""
        reference = np.load(self.directory / "reference.npy")
        before, now = (neighbours.find(each, NEIGHBOURS) for each in (reference, vectors))
        return {
            "cosine": metrics.summary(metrics.cosines(reference, vectors)),
            "top10_overlap": neighbours.overlap(before, now, NEIGHBOURS),
        }


def contract() -> Contract:
    """SmolLM2's input contract."""
    return read_contract(CONTRACT)


def embed(bundle: Path, variant: str, compute: str) -> NDArray[np.float32]:
    """Unit vectors of the texts, float32 ``[texts, hidden_size]``."""
    threads = hardware.probe().cpu_threads
    plan = Plan(variant, "torch", "cpu", compute, "resident", threads=threads)
    runner = Runner(Bundle(bundle), plan)
    return runner.embed(runner.tokenizer.encode_rows(data.load(TEXTS)), normalize=True)


def picture(steps: dict[str, Measured], llama: dict[str, Measured]) -> None:
    """Bits against lost cosine, as ``benchmarks/results/quantizers.svg``."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plot

    matplotlib.rcParams["svg.hashsalt"] = NAME
    figure, axes = plot.subplots(figsize=(7.2, 3.8), layout="constrained")
    ours = {name: steps[name] for name in ("int4", "bnb-nf4", "int4-5.5", "int8", "bnb-int8")}
    plain = {name: one for name, one in steps.items() if name.endswith("data-free")}
    # Where names stand beside their points, so that none stands on another.
    right, below, left = ((6, 3), "left"), ((6, -10), "left"), ((-6, -3), "right")
    own = {"bnb-nf4": right, "bnb-nf4, data-free": ((-6, -13), "right")}
    for title, points, colour, marker, (place, side) in (
        ("lowmem", ours, "#2457a7", "o", below),
        ("lowmem, --calibration none", plain, "#7c98c4", "s", left),
        ("llama.cpp", llama, "#b4502a", "^", right),
    ):
        axes.plot(
            [one["bits"] for one in points.values()],
            [1 - one["cosine"]["mean"] for one in points.values()],
            marker,
            color=colour,
            label=title,
        )
        for name, one in points.items():
            offset, alignment = own.get(name, (place, side))
            axes.annotate(
                name.removesuffix(", data-free"),
                (one["bits"], 1 - one["cosine"]["mean"]),
                xytext=offset,
                ha=alignment,
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the linears")
    axes.set_ylabel("1 − mean cosine to 16 bits")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(3.8, 9)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(RESULTS / f"{NAME}.svg", metadata={"Date": None})


def main() -> None:
    """Measures what is missing, and writes the record once nothing is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / NAME)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    site = Site(arguments.directory)
    if arguments.step is not None:
        name = arguments.step
        print(json.dumps(site.measure_llama(name) if name in LLAMA_TYPES else site.measure(name)))
        return
    about = head(NAME, "python benchmarks/quantizers.py")
    site.directory.mkdir(parents=True, exist_ok=True)
    kept = site.directory / "measured.json"
    measured = resume(kept, about, parser.error)
    if not kept.exists():
        site.clear()
    site.prepare()
    names = (*STEPS, *LLAMA_TYPES)
    measure_missing({name: partial(site.in_a_process, name) for name in names}, measured, kept)
    steps = {name: measured["steps"][name] for name in STEPS}
    llama = {name: measured["steps"][name] for name in LLAMA_TYPES}
    picture(steps, llama)
    texts = data.load(TEXTS)
    model = {"model": Bundle(site.fp16).manifest.source["name"]}
    write(
        {
            **about,
            **model,
            "texts": {"name": TEXTS, "count": len(texts), "sha256": data.sha256(texts)},
            "steps": steps,
            "llama_cpp": llama,
        }
    )


if __name__ == "__main__":
    main()
