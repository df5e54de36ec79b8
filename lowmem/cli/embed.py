"""``lowmem embed``: a file of texts becomes a file of vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli import options
from lowmem.errors import InputError
from lowmem.text.files import check_output, read_rows, write_vectors


def embed(
    bundle: options.Bundle,
    input_file: Annotated[
        Path, typer.Argument(metavar="INPUT", help=".txt, .jsonl, .csv or .parquet")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help=".npy, .parquet or .jsonl")],
    input_type: Annotated[str, typer.Option(help="query or document.")] = "document",
    task: Annotated[
        str | None, typer.Option(help="A query's instruction, or a task's name in the contract.")
    ] = None,
    column: Annotated[str, typer.Option(help="Where the text is.")] = "text",
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long.")
    ] = False,
    variant: options.Variant = "auto",
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    compute: options.Compute = "auto",
    schedule: options.Schedule = "auto",
    floor: options.Floor = "standard",
) -> None:
    """Embed a file, with the fastest plan that fits this machine and is faithful."""
    check_output(output, source=input_file)
    rows = read_rows(input_file, column=column, input_type=input_type, task=task)
    if not rows:
        raise InputError(f"{input_file} holds no text")

    from lowmem.embedder import Embedder

    model = Embedder.load(
        bundle,
        variant=variant,
        engine=engine,
        device=device,
        compute=compute,
        schedule=schedule,
        floor=floor,
    )
    sys.stderr.write(f"plan {model.plan.id}: {model.plan.reason}\n")
    vectors = model.embed(
        [row.text for row in rows],
        [model.contract.prompt(row.input_type, row.task) for row in rows],
        names=[f"line {row.line} of {input_file.name}" for row in rows],
        truncate=truncate,
        show_progress_bar=True,
    )
    write_vectors(output, rows, vectors)
    typer.echo(f"{len(vectors)} vectors of {vectors.shape[1]} dimensions in {output}")
