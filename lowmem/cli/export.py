"""``lowmem export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lowmem import data
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract, read_contract
from lowmem.artifact.manifest import MANIFEST, Bundle
from lowmem.artifact.models import known_models
from lowmem.artifact.variants import VARIANTS, budgeted, check_variants
from lowmem.cli.options import parse_size, size_text
from lowmem.compute.plan import DEVICES
from lowmem.data import Row
from lowmem.errors import CapacityError, InputError, missing_extra
from lowmem.planner.candidates import AUTO
from lowmem.progress import Steps, bar
from lowmem.text.reading import read_rows

BUILT_IN = "built-in"


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model directory, a .gguf file, or a hub id ORG/NAME[@REVISION].",
            show_default=False,
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="Where to write.", show_default=False)],
    variants: Annotated[
        str, typer.Option(help="Names with commas between: those of the default, or int4-BITS.")
    ] = ",".join(VARIANTS),
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="Write int4-B for int4: bits per weight on average, in a mixture of 4 and 8.",
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE|none",
            help="Your own texts to steer the quantizers by; none: the weights alone do.",
        ),
    ] = BUILT_IN,
    contract: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A known model, or a JSON file with the input contract."
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write ONNX graphs.")] = True,
    reference_texts: Annotated[
        str, typer.Option(help="probe, quick, none, or auto: probe unless it is slow here.")
    ] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Refuse to begin if this process may need more, such as 3G."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="What calibrates: cpu, cuda, or auto (a GPU with room, else the CPU)."),
    ] = AUTO,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the source's files instead of linking them.")
    ] = False,
    accept_licence: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A licence of the source that you have read."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make variants anew that are there.")
    ] = False,
) -> None:
    """Write a bundle from a checkpoint, or add variants to one."""
    if find_spec("onnx_ir") is None and onnx:
        raise missing_extra("onnx_ir", "export", "writing ONNX graphs")
    rows = _calibration_rows(calibration)
    if reference_texts not in ("auto", "probe", "quick", "none"):
        raise InputError(
            f"reference-texts must be auto, probe, quick or none, got {reference_texts!r}"
        )
    if device not in (AUTO, *DEVICES):
        raise InputError(f"device must be auto or one of {', '.join(DEVICES)}, got {device!r}")
    most_bytes = None if max_memory is None else parse_size(max_memory, "--max-memory")
    names = [name.strip() for name in variants.split(",") if name.strip()]
    check_variants(names)
    if bits is not None:
        if "int4" not in names:
            raise InputError("--bits needs int4 among the variants")
        names = [budgeted(bits) if name == "int4" else name for name in names]
    if reference_texts in ("probe", "quick") and "fp16" not in {*names, *_there(bundle)}:
        raise InputError(f"--reference-texts {reference_texts} needs fp16 among the variants")
    from export.sources import open_source

    # Before any weights are downloaded.
    settled, model = _contract(contract, _known_models(source), source)
    if calibration != BUILT_IN:
        for row in rows:
            settled.prompt(row.input_type, row.task)  # or it has no such prompt
    accepts = _acceptance(accept_licence or ())
    with Steps() as progress:
        opened = open_source(source, accepts_licence=accepts, progress=progress)
    typer.echo(f"licence: {opened.licence or 'none named by the source'}", err=True)
    if most_bytes is not None and "fp16" in names and reference_texts != "none":
        _check_reference_memory(opened.config, most_bytes)
    there = () if force else _there(bundle)
    kept = [name for name in dict.fromkeys(names) if name in there]
    from export.pipeline import export as run  # with torch, which what is refused need not wait for

    calibrates_on = _calibrating_device(device, opened.config) if rows else "cpu"
    with Steps() as progress:
        run(
            opened,
            bundle,
            settled,
            model=model,
            variants=names,
            calibration=rows,
            onnx=onnx,
            copy=copy,
            force=force,
            max_memory=most_bytes,
            device=calibrates_on,
            accepts_licence=accepts,
            progress=progress,
        )
    if kept:
        typer.echo(
            f"{', '.join(kept)}: there already, made alike, and kept; --force makes them anew",
            err=True,
        )
    result = Bundle(bundle)
    _write_reference(result, reference_texts)
    for name in sorted(result.manifest.variants):
        variant = result.variant(name)
        typer.echo(
            f"{name:<9} {variant.bits_per_weight['linears']:6.3f} bits/weight  "
            f"{size_text(variant.stored_bytes)}"
        )


def _there(bundle: Path) -> Collection[str]:
    """Variants of a bundle that is to be added to."""
    return Bundle(bundle).manifest.variants if (bundle / MANIFEST).is_file() else ()


def _calibration_rows(calibration: str) -> Sequence[Row]:
    if calibration == "none":
        return ()
    if calibration == BUILT_IN:
        return data.load("calibration")
    rows = read_rows(Path(calibration))
    if not rows:
        raise InputError(f"{calibration} holds no text")
    return rows


def _calibrating_device(wanted: str, config: ModelConfig) -> str:
    """What calibrates; where that was left open, and there is a card, it is told."""
    from export.memory import calibrating_device
    from lowmem import hardware

    machine = hardware.probe()
    device, why = calibrating_device(wanted, config, machine)
    if wanted == AUTO and machine.gpus:
        typer.echo(f"calibrating on {device}: {why}", err=True)
    return device


def _known_models(source: str) -> Sequence[str]:
    """Models that the source may be; of one on the hub only what tells them apart is brought."""
    from export.detection import detect
    from export.sources import fetch_description, hub_model

    model = hub_model(source)
    if model is None:
        return detect(Path(source))
    exact = detect(Path(source), model.name)
    return exact or detect(fetch_description(model))


def _contract(wanted: str | None, found: Sequence[str], source: str) -> tuple[Contract, str | None]:
    """The contract, and the known model that the source is taken for, or None.

    Args:
        wanted: ``--contract``.
        found: Models that the source may be, as ``detect`` gives them.
        source: Its name.
    """
    models = known_models()
    if wanted is None and len(found) != 1:
        why = f"its files fit {', '.join(found)} alike" if found else "its files fit no known model"
        names = ", ".join(found or models)
        raise InputError(
            f"the input contract of {source} must be given, {why}: give --contract NAME "
            f"(of {names}), or --contract FILE, a JSON object with templates, special tokens, "
            "attention, pooling and length limit (README, 'The input contract')"
        )
    named = found[0] if wanted is None else wanted
    if named in models:
        return models[named].contract, named
    if not os.path.isfile(named):  # Path.is_file raises where a name is too long
        raise InputError(
            f"--contract takes a JSON file or one of {', '.join(models)}, and {named!r} is neither"
        )
    return read_contract(Path(named)), found[0] if len(found) == 1 else None


def _acceptance(named: Collection[str]) -> Callable[[str], bool]:
    """Accepts the licences that are named, and on a terminal asks once about each other."""
    known = {name.casefold() for name in named}

    @functools.cache
    def accepts(licence: str) -> bool:
        if licence.casefold() in known:
            return True
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return False
        question = f"The model's licence, {licence!r}, may not permit every use. Do you accept it?"
        return typer.confirm(question, err=True)

    return accepts


def _check_reference_memory(config: ModelConfig, most_bytes: int) -> None:
    """Refuses reference vectors that may need more memory than is allowed."""
    from lowmem import hardware
    from lowmem.artifact.variants import formats_for
    from lowmem.fidelity import reference
    from lowmem.planner import memory

    machine = hardware.probe()
    plan = reference.plan(machine.cpu_threads)
    needed, _ = memory.predict(plan, config, formats_for("fp16", config, "F16"), machine)
    if needed > most_bytes:
        raise CapacityError(
            f"reference vectors may need {size_text(needed)} of memory, {size_text(most_bytes)} "
            "are allowed: --reference-texts none leaves them to the first report"
        )


def _write_reference(bundle: Bundle, texts: str) -> None:
    """Makes the reference vectors, unless the bundle has those that are wanted."""
    from lowmem import hardware
    from lowmem.artifact.weights import Checkpoint
    from lowmem.errors import BundleError
    from lowmem.fidelity import reference, stored_reference

    if texts == "none" or "fp16" not in bundle.manifest.variants:
        return
    enough = {texts}
    if texts == "auto":
        texts = reference.built_in_texts(Checkpoint(bundle.directory("fp16")).config)
        enough = {texts, "probe"}
    try:
        known = stored_reference.read(bundle)
    except BundleError:  # of another export, or damaged: made again below
        known = None
    if known is not None and known.name in enough:
        return
    rows = data.load(texts)
    with bar(f"reference vectors of {len(rows)} texts", len(rows)) as advance:
        made = reference.compute(bundle, texts, rows, hardware.probe().cpu_threads, advance)
    stored_reference.write(bundle, made)
