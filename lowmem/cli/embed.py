"""``lowmem embed``: a file of texts becomes a file of vectors."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.cli import options
from lowmem.disk import mapped
from lowmem.errors import InputError
from lowmem.text.reading import InputRow, read_rows
from lowmem.text.tokenizer import Tokenizer
from lowmem.text.writing import check_room, check_vectors_output, write_vectors


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
    check_vectors_output(output, others=[input_file, bundle])
    rows = read_rows(input_file, column=column, input_type=input_type, task=task)
    if not rows:
        raise InputError(f"{input_file} holds no text")

    from lowmem.embedder import Embedder
    from lowmem.planner.choice import repeated_share

    prompts, names = _before_planning(Bundle(bundle), rows, input_file, truncate)
    model = Embedder.load(
        bundle,
        variant=variant,
        engine=engine,
        device=device,
        compute=compute,
        schedule=schedule,
        floor=floor,
        repeated=repeated_share([row.text for row in rows], prompts),
        show_progress_bar=True,
    )
    typer.echo(options.wrapped(f"plan {model.plan.id}: {model.plan.reason}"), err=True)
    computed = mapped(
        Path(os.path.realpath(output)).parent, (len(rows), model.dimensions), "embedding"
    )
    check_room(output, *computed.shape)
    vectors = model.embed(
        [row.text for row in rows],
        prompts,
        names=names,
        truncate=truncate,
        show_progress_bar=True,
        out=computed,
    )
    write_vectors(output, rows, vectors)
    typer.echo(f"{len(vectors)} vectors of {vectors.shape[1]} dimensions in {output}")


def _before_planning(
    bundle: Bundle, rows: Sequence[InputRow], file: Path, truncate: bool
) -> tuple[list[str], list[str]]:
    """Prompts and names of the rows; refuses texts that are too long, which timing would delay."""
    prompt = functools.cache(bundle.contract.prompt)
    prompts = [prompt(row.input_type, row.task) for row in rows]
    names = [f"line {row.line} of {file.name}" for row in rows]
    # A token has at least one byte, so only these can have too many.
    most_bytes = bundle.contract.max_seq_length - bundle.contract.special_tokens
    long = [
        number
        for number, row in enumerate(rows)
        if len(prompts[number].encode()) + len(row.text.encode()) > most_bytes
    ]
    if long and not truncate and bundle.manifest.variants:
        directory = bundle.directory(min(bundle.manifest.variants))
        vocab_size = Checkpoint(directory).config.vocab_size
        Tokenizer(directory / "tokenizer.json", bundle.contract, vocab_size).encode(
            [rows[number].text for number in long],
            [prompts[number] for number in long],
            names=[names[number] for number in long],
        )
    return prompts, names
