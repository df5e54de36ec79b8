"""``lowmem info``: what a bundle holds, and whether it is still what was exported."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle
from lowmem.cli import options
from lowmem.errors import BundleError


def info(
    bundle: options.Bundle,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file again, and name strays.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show a bundle's contract, licence, variants, sizes and reports."""
    opened = Bundle(bundle)
    facts = _facts(opened)
    strays: list[str] = []
    if verify:
        problems, strays = opened.verify()
        if problems:
            raise BundleError("; ".join(problems))
        facts["verified"] = True
        facts["strays"] = strays
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    contract = opened.contract
    source = facts["source"]
    revision = f"@{source['revision']}" if source.get("revision") else ""
    typer.echo(f"source    {source['name']}{revision}  (sha256 {source['sha256'][:16]}…)")
    typer.echo(f"licence   {facts['licence'] or 'none named by the source'}")
    typer.echo(
        f"contract  {contract.pooling}, {'causal' if contract.is_causal else 'bidirectional'}, "
        f"at most {contract.max_seq_length} tokens, "
        f"BOS {contract.bos_token_id}, EOS {contract.eos_token_id}"
    )
    typer.echo(f"queries   {contract.query_template!r}")
    typer.echo(f"documents {contract.document_template!r}")
    if contract.tasks:
        typer.echo(options.wrapped(", ".join(sorted(contract.tasks)), "tasks     ", " " * 10))
    typer.echo("\nvariant     bits/weight       size  graphs")
    for name, entry in facts["variants"].items():
        graphs = ", ".join(f"{file} ({compute})" for file, compute in entry["graphs"].items())
        typer.echo(
            f"{name:<10} {entry['bits_per_weight']['linears']:12.3f} "
            f"{options.size_text(entry['bytes']):>10}  {graphs}".rstrip()
        )
    typer.echo("\nreports")
    for entry in facts["reports"]:
        state = "" if entry["current"] else "  (of another export)"
        typer.echo(f"{entry['plan']:<38} mean cosine {entry['mean']:.5f}{state}")
    if not facts["reports"]:
        typer.echo("none: lowmem report makes them")
    if verify:
        typer.echo("\nall files are those that were exported")
        for stray in strays:
            typer.echo(f"stray: {stray}")


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "format": 1,
        "source": dict(manifest.source),
        "licence": manifest.licence,
        "contract": manifest.contract.to_json(),
        "variants": {
            name: {
                "bytes": variant.stored_bytes,
                "bits_per_weight": dict(variant.bits_per_weight),
                "graphs": dict(variant.graphs),
                "recipe": dict(variant.recipe),
                "artifact_sha256": bundle.artifact_sha256(name),
            }
            for name, variant in sorted(manifest.variants.items())
        },
        "reports": _reports(bundle),
    }


def _reports(bundle: Bundle) -> list[dict[str, Any]]:
    found = []
    for path in sorted((bundle.path / "reports").glob("*.json")):
        report = strict_json.read_object(path)
        if "reports" in report:  # of report --json, put there by hand
            continue
        try:
            plan, mean = str(report["plan"]), float(report["cosine"]["mean"])
            texts, artifact = report["texts"], report["artifact_sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"a report needs plan, cosine, texts and artifact_sha256 ({path})"
            ) from error
        names = [name for name in bundle.manifest.variants if plan.startswith(f"{name}-")]
        variant = max(names, key=len, default=None)  # a plan of int4-5.5 begins as one of int4 does
        current = variant is not None and bundle.artifact_sha256(variant) == artifact
        found.append({"plan": plan, "mean": mean, "current": current, "texts": texts})
    return found
