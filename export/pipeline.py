"""The export: lay out, quantize group by group, write, check, publish.

Memory holds a few tensors of the source at a time, one layer where texts steer the quantizers.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from export import licences, sensitivities
from export.allocation import Effects, allocate, pooled_effects, some_texts
from export.calibration import Calibration, states_scratch_bytes
from export.disagreements import disagreements
from export.groups import read_tensor, write_groups
from export.hidden_states import LONGEST_TOKENS, Texts, texts_scratch_bytes
from export.identity import SourceIdentity
from export.job import Job, kept_files, work_digest
from export.layout import lay_out
from export.linking import links
from export.memory import check_memory, within_card
from export.sources import Source
from export.variant_files import check_linked, finish, link_shards, write_small_files
from export.workspace import Workspace
from lowmem import data
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle, Manifest
from lowmem.artifact.sentence_transformers_files import (
    lacks_query_prompt,
    mean_leaves_out_prompts,
)
from lowmem.artifact.stock_files import TOKENIZER
from lowmem.artifact.stock_files import render as render_stock_files
from lowmem.artifact.variants import (
    budget_of,
    check_variants,
    formats_for,
    graphs_for,
    recipe_for,
)
from lowmem.artifact.weights import EMBEDDING, Checkpoint
from lowmem.compute.heap import give_back_freed_memory
from lowmem.compute.operations.products import check_float32
from lowmem.data import Row
from lowmem.disk import nearest_directory
from lowmem.errors import BundleError, InputError
from lowmem.progress import Progress
from lowmem.text.batching import EncodedText
from lowmem.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 32 * 2**20
# How many calibration tokens suffice a format; what is not here gains from all there are.
_ENOUGH_TOKENS = {"int8-channel": 20_000, "bnb-int8": 8_000, "bnb-nf4": 16_000}


def export(
    source: Source,
    bundle: Path,
    contract: Contract,
    *,
    model: str | None = None,
    variants: Sequence[str],
    calibration: Sequence[Row] = (),
    onnx: bool = True,
    copy: bool = False,
    force: bool = False,
    max_memory: int | None = None,
    device: str = "cpu",
    accepts_licence: licences.Accepts = licences.accepts_none,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Writes variants of a model into a bundle, or adds them to one.

    Args:
        source: The checkpoint.
        bundle: The bundle's directory; made if it is not there.
        contract: The input contract; its length limit is cut to the model's own.
        model: Short name of the known model that it is, for the manifest.
        variants: Names of the variants.
        calibration: Texts that steer the quantizers; without any the weights alone do.
        onnx: Whether to write ONNX graphs.
        copy: Whether to write the bytes of ``fp16`` again instead of linking the source's files.
        force: Whether to make variants anew that are there, however they were made.
        max_memory: Bytes that the process may hold at most, or None.
        device: What calibrates: ``cpu`` or ``cuda``.
        accepts_licence: Asked about each licence that may not permit every use.
        progress: Told what has been done.

    Returns:
        The new manifest.

    Raises:
        BundleError: The source is damaged or changes meanwhile, or the bundle was made from
            another one.
        BackendError: torch is set to multiply float32 in fewer bits.
        CapacityError: The disk or the card has not enough room, or more than ``max_memory`` may be
            needed.
        InputError: The licence is not accepted, a variant is unknown or is there from another
            recipe, or BUNDLE is no bundle or cannot be written.
    """
    check_variants(variants)
    if max_memory is not None:
        check_memory(source, max_memory, is_calibrated=bool(calibration))
    if calibration:
        check_float32()
    licences.check(source.licence, accepts_licence, source.name)
    if contract.is_causal and not source.config.is_stock:
        raise InputError(
            f"the attention of {source.name} is bidirectional, as its config.json says, and the "
            "contract's is causal: give the contract of this model"
        )
    config = replace(source.config, is_stock=contract.is_causal)
    contract = contract.bounded(config.longest_sequence)
    dtype = "BF16" if source.dtype == "BF16" else "F16"
    with Workspace(bundle) as workspace:
        old = workspace.manifest()
        identity = SourceIdentity(source, progress)
        stanza = _source_stanza(source, model, identity)
        if old is not None and old.source["sha256"] != stanza["sha256"]:
            raise BundleError(
                f"{bundle} was exported with another source: choose another directory"
            )
        if old is not None and old.contract != contract:
            raise BundleError(
                f"{bundle} was exported with another contract: choose another directory"
            )
        if old is not None and model is not None and old.source.get("model") not in (None, model):
            raise BundleError(
                f"{bundle} was exported as {old.source['model']}, not {model}: choose another "
                "directory"
            )
        if not variants:
            raise InputError("variants must name at least one variant")
        tokenizer_files = source.tokenizer_files()
        stock = render_stock_files(config, contract, tokenizer_files)

        @cache
        def texts() -> list[EncodedText]:
            return _tokenized(calibration, stock[TOKENIZER], contract, config.vocab_size)

        @cache
        def effects() -> Effects:
            some = some_texts(texts())
            scratch = nearest_directory(bundle)
            with within_card(device):
                return pooled_effects(source, contract, dtype, some, scratch, device, progress)

        jobs = []
        steered_by = data.sha256(calibration) if calibration else None
        for name in dict.fromkeys(variants):
            recipe = recipe_for(name, dtype, steered_by)
            if old is not None and name in old.variants and not force:
                _check_existing(bundle, old, name, recipe, onnx)
                continue
            budget = budget_of(name)
            if budget is None:
                formats = formats_for(name, config, dtype)
            elif not calibration:
                raise InputError(f"{name} needs calibration texts: they decide where its bits go")
            else:
                workspace.foresee(name, int(budget * config.linear_weights / 8))
                formats = allocate(effects(), config, budget)
            linked = name == "fp16" and source.shards is not None
            layout = None if linked else lay_out(config, dtype, formats)
            jobs.append(Job(name, recipe, formats, layout))
        if not jobs and old is not None:
            workspace.clear()
            return old

        for problem in disagreements(source.stated, tokenizer_files, contract):
            logger.warning("%s: %s", source.name, problem)
        if lacks_query_prompt(stock):
            logger.warning(
                "%s: a query needs a task, and the contract has no default: stock "
                "sentence-transformers' encode_query has no instruction to use, and embeds a query "
                "as a document unless it is given the prompt_name of a task, or a prompt",
                source.name,
            )
        if mean_leaves_out_prompts(contract):
            logger.warning(
                "%s: its vectors are means that leave prompts out, which vLLM cannot compute: it "
                "gives others without an error",
                source.name,
            )
        try:
            work = work_digest(identity, contract, jobs, copy=copy, device=device)
            finished = workspace.finished(work)
            kept = kept_files(finished, jobs, source, workspace.partial, progress)
            needed_bytes = _needed_bytes(jobs, source, bundle, copy, texts)
            workspace.begin([job.name for job in jobs], needed_bytes, work, kept)
            if not kept:
                finished = {}
            for job in jobs:
                write_small_files(workspace.partial / job.name, job.formats, config, dtype, stock)
                if job.layout is None:
                    link_shards(source, job, workspace, finished, copy)
            with within_card(device):
                steered = None
                if any(job.is_calibrated for job in jobs):
                    packed = Texts(texts(), config, contract, workspace.partial, device)
                    steered = _calibration(source, packed, dtype, jobs, progress)
                    del packed  # whose scratch goes with what was steered
                hashes = write_groups(
                    source, identity, dtype, jobs, workspace, finished, progress, steered
                )
            errors = steered.errors if steered is not None else {}
            del steered
            written = {}
            for done, job in enumerate(jobs):
                progress("graphs, checks and hashes", done, len(jobs))
                directory = workspace.partial / job.name
                written[job.name] = finish(
                    directory,
                    job,
                    contract,
                    errors.get(job.name, {}),
                    onnx=onnx,
                    weights_sha256=hashes.get(job.file),
                )
                if job.layout is None:
                    check_linked(source, identity, written[job.name])
        except (BundleError, OSError):
            identity.check()  # a source that changed explains whatever else went wrong
            raise
        identity.check()
        manifest = Manifest(
            {**old.source, "model": old.source.get("model") or model} if old else stanza,
            source.licence,
            contract,
            {**(old.variants if old else {}), **written},
        )
        workspace.publish([job.name for job in jobs], manifest)
    return manifest


def _source_stanza(source: Source, model: str | None, identity: SourceIdentity) -> dict[str, Any]:
    """Name and identity of a source."""
    return {
        "name": source.name,
        "sha256": identity.sha256,
        "revision": source.revision,
        "model": model,
    }


def _check_existing(
    bundle: Path, old: Manifest, name: str, recipe: Mapping[str, Any], onnx: bool
) -> None:
    there = old.variants[name]
    refusal = InputError(
        f"{bundle} already has a variant {name} that was made otherwise: --force replaces it"
    )
    if there.recipe != recipe:
        raise refusal
    opened = Bundle(bundle)
    opened.check(name)
    checkpoint, is_causal = Checkpoint(opened.directory(name)), old.contract.is_causal
    graphs = graphs_for(checkpoint.formats, checkpoint.config.head_dim, is_causal=is_causal)
    if onnx and graphs and not there.graphs:
        raise refusal


def _calibration(
    source: Source, texts: Texts, dtype: str, jobs: Sequence[Job], progress: Progress
) -> Calibration:
    """The calibration texts in front of the first layer."""
    calibrated = {
        job.name: _ENOUGH_TOKENS.get(next(iter(job.formats.values())).name)
        for job in jobs
        if job.is_calibrated
    }
    sensitive = sensitivities.token_sensitivities(source, texts, dtype, progress)
    give_back_freed_memory()
    return Calibration(texts, sensitive, read_tensor(source, EMBEDDING, dtype), calibrated)


def _tokenized(
    rows: Sequence[Row], tokenizer: bytes, contract: Contract, vocab_size: int
) -> list[EncodedText]:
    """Texts as the variants will read them, by the content of their ``tokenizer.json``.

    None is longer than what calibration holds in memory at a time.
    """
    contract = contract.bounded(LONGEST_TOKENS)
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        path = Path(folder) / TOKENIZER
        path.write_bytes(tokenizer)
        encoded = Tokenizer(path, contract, vocab_size).encode_rows(rows)
    cut = [row.id for row, text in zip(rows, encoded, strict=True) if text.cut_tokens]
    if cut:
        logger.warning(
            "calibration texts cut to %d tokens: %d of %d; the first is %s",
            contract.max_seq_length,
            len(cut),
            len(rows),
            cut[0],
        )
    return encoded


def _needed_bytes(
    jobs: Sequence[Job],
    source: Source,
    bundle: Path,
    copy: bool,
    texts: Callable[[], Sequence[EncodedText]],
) -> int:
    needed = 0
    if calibrated := sum(job.is_calibrated for job in jobs):
        tokens = sum(len(text.input_ids) for text in texts())
        needed += texts_scratch_bytes(source.config, tokens) + max(
            sensitivities.scratch_bytes(source.config, tokens),
            states_scratch_bytes(source.config, tokens, calibrated),
        )
    latents = source.config.latent_attention
    folded = 0 if latents is None else latents.folded_bytes(source.config.hidden_size)
    place = nearest_directory(bundle)
    for job in jobs:
        needed += _SMALL_FILES_BYTES + folded
        if job.layout is not None:
            needed += job.layout.size
        else:
            for shard in source.shards or ():
                if copy or not links(shard, place):
                    needed += shard.stat().st_size
    return needed
