"""The command line: one verb, one file. Results go to stdout, all else to stderr."""

from __future__ import annotations

import io
import logging
import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from lowmem.cli import bench, check, embed, export, info, plan, report
from lowmem.errors import LowmemError

app = typer.Typer(
    name="lowmem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowmem {metadata.version('lowmem')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Embeddings of a 7B model on your own machine, and what quantization did to them."""


app.command("export")(export.export)
app.command("info")(info.info)
app.command("plan")(plan.plan)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("check")(check.check)
app.command("embed")(embed.embed)


def main() -> None:
    """Runs the command line: exit status 0 done, 1 error, 2 usage, 3 below the floor."""
    if sys.stderr is None:  # closed by whoever began this process
        sys.stderr = open(os.devnull, "w")
    logging.basicConfig(format="lowmem: %(message)s", level=logging.WARNING, stream=sys.stderr)
    if not sys.stderr.isatty():
        # huggingface_hub draws its bars everywhere, and reads this when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It also tells each retry; what came of them is told by our own error.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where it is not UTF-8
    try:
        app()
    except BrokenPipeError:
        # Whoever reads our output has gone; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (LowmemError, OSError) as error:
        # The system's words are for a full disk or a missing right that no layer below has put so.
        text = " ".join(str(error).split())
        sys.stderr.write(f"lowmem: error: {text}\n")
        raise SystemExit(1) from None
